"""`tinygpt study norms`: small models trained in turn, each kept in a file once it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tinygpt.data.dataset import Dataset
from tinygpt.data.find_files import SHAKESPEARE
from tinygpt.data.prepare import prepare
from tinygpt.errors import InputError, say
from tinygpt.storage import read_text, write_text
from tinygpt.study import shown
from tinygpt.study.norms import Cell, Norms, Trained, cells, entropies_of, train_cells
from tinygpt.study.report import Report


def study(sources: Sequence[str], quick: bool, kept: Path) -> Report:
    """Train the cells that the file does not have yet, and report on all.

    Args:
        sources: files of text, as `train` takes them; none is Shakespeare's plays.
        kept: JSON lines, one for each cell.
    """
    with TemporaryDirectory() as folder:
        prepare(sources or SHAKESPEARE, Path(folder, "data"), "char", val=0.1)
        data = Dataset.open(Path(folder, "data"))
        ids = np.concatenate([split[: len(split)] for split in (data.train, data.val)])
    text, some = hashlib.sha256(ids.tobytes()).hexdigest(), cells(quick)
    done = _read(kept, text)
    missing = [cell for cell in some if cell not in done]
    # Before any training, so that a place that cannot be written is told at once; and without a
    # line that was cut short, which the next would lengthen.
    write_text(kept, "".join(_line(text, each) for each in done.values()))
    if len(missing) < len(some):
        say(f"{kept} has {len(some) - len(missing)} of {len(some)} models: going on with the rest")
    for number, trained in enumerate(train_cells(missing, ids), len(some) - len(missing) + 1):
        done[trained.cell] = trained
        with kept.open("a", encoding="utf-8") as file:
            file.write(_line(text, trained))
        cell = ", ".join(map(str, trained.cell))
        say(f"{number} of {len(some)}: {cell}: loss {trained.result:.3f}")
    return shown.norms_report(Norms(*entropies_of(ids), [done[cell] for cell in some]))


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
