"""Which checkpoint of a training run is meant: by the run's folder, by `RUN/best` or `RUN/last`.

A run keeps its checkpoints in folders `step-N`, and names two of them in small files, since links
are not to be had everywhere: not on exFAT, on network drives, on Windows. Older runs have links
there, and a copy of one may have whole folders.
"""

from __future__ import annotations

import re
from pathlib import Path

from tinygpt.errors import CheckpointError, reason

NAMES = ("best", "last")
_STEP = re.compile(r"step-[0-9]{8,18}")
_MOST_BYTES = 64


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
            raise CheckpointError(f"{path} names {step}, which is not there as a whole checkpoint")
        return run / step
    if name == "last":
        steps = sorted(found for found in run.glob("step-*") if _STEP.fullmatch(found.name))
        return next((found for found in reversed(steps) if _is_checkpoint(found)), None)
    return None


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
    """The step that such a file names; None where it is another kind of file."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    return text if _STEP.fullmatch(text) else None
