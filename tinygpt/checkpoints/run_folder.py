"""Which checkpoint of a training run is meant: by the run's folder, by `RUN/best` or `RUN/last`.

A run keeps its checkpoints in folders `step-N`, and names two of them in small files, since links
are not to be had everywhere: not on exFAT, on network drives, on Windows. Older runs have links
there, and a copy of one may have whole folders.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from tinygpt.errors import CheckpointError, reason, show
from tinygpt.storage import open_plain

NAMES = ("best", "last")
STEP = re.compile(r"step-[0-9]{8,18}")
_MOST_BYTES = 64


def pointer(step: str) -> str:
    """What such a file holds: the name of a checkpoint's folder and, to be checked, its CRC-32."""
    return f"{step} {zlib.crc32(step.encode()):08x}\n"


def steps(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    found = sorted((path for path in run.glob("step-*") if STEP.fullmatch(path.name)), reverse=True)
    return [path for path in found if _is_checkpoint(path)]


def checkpoint_in(run: Path, name: str) -> Path | None:
    """The folder of a run's checkpoint.

    Args:
        name: one of NAMES. A run whose `last` got lost has its newest instead.
    Returns:
        None where the run, if it is one, has no such checkpoint.
    Raises:
        CheckpointError: when what is named is not there.
    """
    path = run / name
    if _is_checkpoint(path):
        return path.resolve()
    if path.is_file() and (step := _read(path)):
        if not _is_checkpoint(run / step):
            fact = f"names {step}, which is not there as a whole checkpoint"
            raise CheckpointError(f"{path} {fact}: {_advice(path)}")
        return run / step
    return next(iter(steps(run)), None) if name == "last" else None


def followed(path: Path) -> Path:
    """The checkpoint that a path of a run stands for: its best, or else its last, or the named.

    Any other path is given back as it is.

    Raises:
        CheckpointError: as from `checkpoint_in`.
    """
    if path.name in NAMES and path.is_file() and _read(path):
        return checkpoint_in(path.parent, path.name) or path
    if path.is_dir() and not (path / "config.json").is_file():
        found = (checkpoint_in(path, name) for name in NAMES)
        return next((checkpoint for checkpoint in found if checkpoint), path)
    return path


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file()


def _read(path: Path) -> str | None:
    """The step that such a file names; None where it is another kind of file.

    Raises:
        CheckpointError: when it cannot be read, or lies in a run and names no step.
    """
    try:
        with open_plain(path) as file:
            text = file.read(_MOST_BYTES).decode("ascii", "replace")
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    step = text.partition(" ")[0]
    if STEP.fullmatch(step) and text == pointer(step):
        return step
    if STEP.fullmatch(text.strip()):  # an older run's, or written by hand
        return text.strip()
    if steps(path.parent):
        raise CheckpointError(f"{path} is damaged, it holds {show(text)}: {_advice(path)}")
    return None


def _advice(path: Path) -> str:
    names = [found.name for found in steps(path.parent)[:1]]
    return " or ".join(["remove it", *(f"write {name} into it" for name in names)])
