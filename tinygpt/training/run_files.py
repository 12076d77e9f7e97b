"""A training run's folder: checkpoints that are there whole or not at all, and exact to go on from.

Each checkpoint is a folder `step-N`: the model and its tokenizer as `GPT.from_pretrained` reads
them, what else training depends on in `training.safetensors`, and `state.json`. The files `last`
and `best` name two of them: see `checkpoints.run_folder`. A folder gets its name once all of it is
on the disk, and such a file is replaced in one go, so whatever ends the program, `last` leads to a
complete checkpoint.

`SHA256SUMS` in a checkpoint says what its other files are to be. A disk that has let a bit of them
turn is found out before anything is loaded: see `newest`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor

from tinygpt.checkpoints import safetensors_file
from tinygpt.checkpoints.run_folder import NAMES, STEP, checkpoint_in, pointer, steps
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.errors import CheckpointError, InputError, reason, say, show
from tinygpt.model import GPT
from tinygpt.storage import (
    DIGESTS,
    TEMPORARY,
    check_digests,
    digests_of_written,
    open_plain,
    read_json,
    sync_folder,
    temporary_beside,
    write_digests,
    write_text,
    write_whole,
)
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.training.settings import MOST
from tinygpt.training.state import State

LOG = "log.jsonl"
_STATE, _TENSORS = "state.json", "training.safetensors"
# The older format had no digests.
_FORMAT, _OLDER = "tinygpt training 2", "tinygpt training 1"


def newest(run: Path) -> Path:
    """The checkpoint to go on from, which and the best are found to be as they were written.

    Raises:
        InputError: when a run has none, or its `last` names what is not there.
        CheckpointError: for the first file that is another: which, and how to go on without it.
    """
    if not (last := checkpoint_in(run, "last")):
        raise InputError(f"{run} has no checkpoint to go on from: leave --resume out")
    best = checkpoint_in(run, "best")
    verify(last)
    if best and best.name != last.name:
        verify(best)
    return last


def verify(folder: Path) -> bool:
    """Refuse a checkpoint of which a file is not as it was written.

    Returns:
        False where it is of an older run, which cannot be checked.
    Raises:
        CheckpointError: naming the file, and how to go on.
    """
    try:
        names = check_digests(folder)
        is_new = bool(names) or read_json(folder / _STATE).get("format") == _FORMAT
        if is_new and _STATE not in names:  # which is the last to be written
            raise CheckpointError(f"{folder / DIGESTS}: it is missing or cut")
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {_advice(folder)}") from error
    return is_new


def _advice(folder: Path) -> str:
    """How a run goes on without a checkpoint that is damaged."""
    run = folder.parent
    if not _is_named(folder, "last"):
        best = f" and {run / 'best'}" if _is_named(folder, "best") else ""
        return f"remove {folder}{best}, and --resume goes on without it"
    for other in steps(run):
        with suppress(CheckpointError):
            if other.name != folder.name and check_digests(other):
                return f"write {other.name} into {run / 'last'}, and --resume goes on from there"
    return "the run has no other checkpoint that is whole, train anew"


def _is_named(folder: Path, name: str) -> bool:
    with suppress(CheckpointError):
        found = checkpoint_in(folder.parent, name)
        return found is not None and found.name == folder.name
    return False


def save(
    run: Path,
    model: GPT,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Tensor],
    state: State,
) -> Path:
    """Write a checkpoint and let `last` name it.

    Args:
        run: the run's folder, made if need be.
        tensors: float32, what training depends on besides the weights.
        state: its step names the checkpoint.
    Returns:
        the checkpoint's folder.
    Raises:
        InputError: when it cannot be written; the checkpoints before stay as they are.
    """
    final = run / step_name(state.counters.step)
    temporary = temporary_beside(final)
    try:
        with digests_of_written() as digests:
            model.save_pretrained(temporary, tokenizer)
            layout = {name: ("F32", tensor.shape) for name, tensor in tensors.items()}
            safetensors_file.write(temporary / _TENSORS, layout, lambda name: tensors[name].numpy())
            content = {"format": _FORMAT, **state.to_json()}
            write_text(temporary / _STATE, json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_digests(temporary, digests)
        # A run killed before `last` named it has left this step, equally complete.
        if final.exists():
            os.rename(final, temporary_beside(final))
        os.rename(temporary, final)
        sync_folder(run)
    except OSError as error:
        raise InputError(f"cannot write {final}: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    point(run, "last", final)
    return final


def point(run: Path, name: str, folder: Path) -> None:
    """Let `last` or `best` in a run's folder name a checkpoint, in one go.

    Raises:
        InputError: when it cannot be written.
    """
    path, temporary = run / name, temporary_beside(run / name)
    try:
        with open(temporary, "xb") as file:
            file.write(pointer(folder.name).encode())
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():  # in a copy whose links were followed
            os.rename(path, temporary_beside(path))
        os.replace(temporary, path)  # this replaces an older run's link, and not what it leads to
        sync_folder(run)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {reason(error)}") from error


def add_entry(log: FileIO, entry: dict[str, Any]) -> None:
    """Write a line of a run's log, whole.

    Raises:
        OSError: when it cannot be written.
    """
    for name, value in entry.items():  # JSON has no word for what is not finite
        if isinstance(value, float) and not math.isfinite(value):
            entry = entry | {name: None}
    write_whole(log, f"{json.dumps(entry, ensure_ascii=False)}\n".encode())


def log_entry(line: str) -> dict[str, Any] | None:
    """One line of a run's log; None where it is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if type(step) is int and 0 <= step <= MOST else None


def cut_log(run: Path, step: int) -> bool:
    """Take out of a log what came after a step, and what is damaged.

    A last line that was cut short is what a killed run leaves; any other is told of.

    Returns:
        whether it has an evaluation of that step.
    Raises:
        CheckpointError: when it cannot be read.
    """
    if not (path := run / LOG).exists():
        return False
    # Not splitlines: samples may hold what that takes for line ends, such as U+2028.
    try:
        with open_plain(path) as file:
            *lines, _ = file.read().decode(errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    entries = [log_entry(line) for line in lines]
    if None in entries:
        more = f" and {count - 1} more are" if (count := entries.count(None)) > 1 else " is"
        say(f"{path}: line {entries.index(None) + 1}{more} damaged, and taken out")
    kept = [
        line
        for line, entry in zip(lines, entries, strict=True)
        if entry is not None and entry["step"] <= step
    ]
    write_text(path, "".join(f"{line}\n" for line in kept))
    return any(entry and entry["step"] == step and "val_loss" in entry for entry in entries)


def prune(run: Path, keep: int, every: int = 0) -> None:
    """Remove all but the newest checkpoints, those that have names, and what a crash left.

    Args:
        every: checkpoints of steps that this divides stay too; 0 divides none.
    """
    named = {found.resolve() for name in NAMES if (found := checkpoint_in(run, name))}
    numbers = {path: int(path.name[5:]) for path in run.glob("step-*") if STEP.fullmatch(path.name)}
    old = [path for path in sorted(numbers)[:-keep] if not every or numbers[path] % every]
    for path in [*old, *run.glob(TEMPORARY)]:
        if path.is_file():
            path.unlink(missing_ok=True)
        elif path.resolve() not in named:
            shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> State:
    """The state in a checkpoint.

    Raises:
        CheckpointError: when it is missing, or no run can have come to it.
    """
    path = folder / _STATE
    content = read_json(path)
    if (form := content.pop("format", None)) not in (_FORMAT, _OLDER):
        raise CheckpointError(
            f"{path}: its format is {show(form)}, not {_FORMAT!r}: to train a "
            "model that is not a checkpoint of training, pass it as --model"
        )
    try:
        state = State.of(content)
        name = step_name(state.counters.step)
        if STEP.fullmatch(folder.name) and folder.name != name:
            raise InputError(f"it is of {name}")
    except InputError as error:
        raise CheckpointError(f"{path}: {error} ({_advice(folder)})") from error
    return state


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def load(folder: Path) -> tuple[GPT, dict[str, np.ndarray], State]:
    """The model, tensors and state that `save` wrote.

    Raises:
        CheckpointError: when something is missing or damaged.
    """
    state, model = read_state(folder), GPT.from_pretrained(folder, "float32")
    if (given := state.config.block_size) > (most := model.config.block_size):
        fact = f"config.block_size is {given}, but the window of the model has {most}"
        raise CheckpointError(f"{folder / _STATE}: {fact} ({_advice(folder)})")
    infos, _ = safetensors_file.read_header(folder / _TENSORS)
    arrays = {name: read_tensor(folder / _TENSORS, info) for name, info in infos.items()}
    return model, arrays, state


def restore(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    """Give tensors the saved values, in place.

    Raises:
        CheckpointError: when names or shapes are not the same.
    """
    if odd := sorted(tensors.keys() ^ arrays.keys()):
        where = "lacks" if odd[0] in tensors else "has, but this run does not,"
        raise CheckpointError(f"{folder / _TENSORS} {where} {show(odd[0])}")
    for name, tensor in tensors.items():
        if arrays[name].shape != tensor.shape or arrays[name].dtype != np.float32:
            found = f"{arrays[name].dtype} {show(arrays[name].shape)}"
            raise CheckpointError(
                f"{folder / _TENSORS}: {name} is {found}, this run has float32 {tensor.shape}"
            )
    for name, tensor in tensors.items():
        tensor.assign(Tensor(arrays[name]).to(tensor.device)).realize()
