"""`tinygpt study norms`: small models trained in turn, each kept in a file once it is done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tinygpt.data.dataset import Dataset
from tinygpt.data.find_files import SHAKESPEARE
from tinygpt.data.prepare import prepare
from tinygpt.errors import InputError, reason, say
from tinygpt.runtime import device
from tinygpt.storage import read_text, write_text
from tinygpt.study import shown
from tinygpt.study.norms import (
    STEPS,
    WINDOW,
    Cell,
    Norms,
    Trained,
    cells,
    entropies_of,
    shape_of,
    train_cells,
)
from tinygpt.study.report import Report

_MOST_PROCESSES = 4  # each takes some hundred megabytes


def study(sources: Sequence[str], quick: bool, kept: Path) -> Report:
    """Train the cells that the file does not have yet, and report on all.

    Args:
        sources: files of text, as `train` takes them; none is Shakespeare's plays.
        kept: JSON lines, one for each cell.
    Raises:
        InputError: when the text is too short, or the file is of something else.
    """
    with TemporaryDirectory() as folder:
        prepare(sources or SHAKESPEARE, Path(folder, "data"), "char", val=0.1)
        data = Dataset.open(Path(folder, "data"))
        ids = np.concatenate([split[: len(split)] for split in (data.train, data.val)])
    if len(ids) <= WINDOW:
        raise InputError(
            f"the text has {len(ids)} tokens, and `study norms` needs {WINDOW + 1}: give more text"
        )
    text, some = hashlib.sha256(ids.tobytes()).hexdigest(), cells(quick)
    done = _read(kept, text)
    missing = [cell for cell in some if cell not in done]
    # Before any training, so that a place that cannot be written is told at once; and without a
    # line that was cut short, which the next would lengthen.
    write_text(kept, "".join(_line(text, each) for each in done.values()))
    if len(missing) < len(some):
        say(f"{kept} has {len(some) - len(missing)} of {len(some)} models: going on with the rest")
    work = _Work(kept, text, ids, len(done) - len(some) + len(missing), len(some), STEPS)
    try:
        work.share_out(missing)
    except KeyboardInterrupt:
        count = sum(cell in some for cell in _read(kept, text))
        say(f"{kept} has {count} of {len(some)} models: the same command goes on with the rest")
        raise
    done = _read(kept, text)
    return shown.norms_report(Norms(*entropies_of(ids), [done[cell] for cell in some]))


@dataclass(frozen=True)
class _Work:
    """What every process that trains is told."""

    kept: Path
    text: str  # its SHA-256
    ids: np.ndarray
    besides: int  # lines of the file that are not counted
    count: int  # of models in all
    steps: int

    def share_out(self, some: Sequence[Cell]) -> None:
        """Train cells in as many processes as there are cores, up to a few, each on one of them.

        A model this small gains little from a second thread.

        Raises:
            InputError: when one of them has failed.
        """
        shares = _shares(some, min(device.cpu_count(), _MOST_PROCESSES))
        if len(shares) < 2 or device.default().partition(":")[0] != "CPU":
            self.train(some)
            return
        new = multiprocessing.get_context("spawn").Process
        processes = [new(target=self.train_on_one_core, args=(share,)) for share in shares]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:  # on Ctrl-C
            for process in processes:
                if process.pid is not None:
                    process.terminate()
                    process.join()
        if any(process.exitcode for process in processes):
            raise InputError(
                f"a process that trains has failed: {self.kept} has what is done, and the same "
                "command goes on with the rest"
            )

    def train_on_one_core(self, some: Sequence[Cell]) -> None:
        """What such a process does."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process has it, and ends this one
        device.use_threads(1)
        try:
            self.train(some)
        except (InputError, MemoryError, OSError) as error:
            say(f"error: {reason(error)}")
            sys.exit(2)

    def train(self, some: Sequence[Cell]) -> None:
        """Train cells in turn, and keep each in the file."""
        for trained in train_cells(some, self.ids, self.steps):
            with self.kept.open("ab", buffering=0) as file:  # one write, whole beside others'
                file.write(_line(self.text, trained).encode())
            number = self.kept.read_bytes().count(b"\n") - self.besides
            cell = ", ".join(map(str, trained.cell))
            say(f"{number} of {self.count}: {cell}: loss {trained.result:.3f}")
            parent = multiprocessing.parent_process()
            if parent is not None and not parent.is_alive():  # killed in a way that it cannot see
                return


def _shares(some: Sequence[Cell], most: int) -> list[list[Cell]]:
    """Cells in lists that take about as long; those of one shape stay beside each other."""
    shapes: dict[object, list[Cell]] = {}
    for cell in some:
        shapes.setdefault(shape_of(cell), []).append(cell)
    shares: list[list[Cell]] = [[] for _ in range(most)]

    def cost(cells: list[Cell]) -> int:
        return sum(cell.depth for cell in cells)

    for same in sorted(shapes.values(), key=cost, reverse=True):
        min(shares, key=cost).extend(same)
    return [share for share in shares if share]


def _line(text: str, trained: Trained) -> str:
    return json.dumps({"text": text, **asdict(trained)}) + "\n"


def _read(path: Path, text: str) -> dict[Cell, Trained]:
    """What a file has; a line that was cut short is left out.

    Raises:
        InputError: when it is of another text, or is something else.
    """
    found: dict[Cell, Trained] = {}
    *whole, _ = read_text(path).split("\n") if path.exists() else [""]
    for line in whole:
        try:
            entry: dict[str, Any] = json.loads(line)
            of, cell = entry.pop("text"), Cell(*entry.pop("cell"))
            found[cell] = Trained(cell, **entry)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            fact = f"{path} holds more than what `study norms` keeps"
            raise InputError(f"{fact}: name another file with --out") from error
        if of != text:
            raise InputError(f"{path} is of another text: name another file with --out")
    return found
