"""A training run's folder: checkpoints that are there whole or not at all, and exact to go on from.

Each checkpoint is a folder `step-N`: the model and its tokenizer as `GPT.from_pretrained` reads
them, what else training depends on in `training.safetensors`, and `state.json`. The files `last`
and `best` name two of them: see `checkpoints.run_folder`. A folder gets its name once all of it is
on the disk, and such a file is replaced in one go, so whatever ends the program, `last` leads to a
complete checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor

from tinygpt.checkpoints import safetensors_file
from tinygpt.checkpoints.run_folder import NAMES, checkpoint_in
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.model import GPT
from tinygpt.storage import TEMPORARY, read_json, sync_folder, temporary_beside, write_text
from tinygpt.tokenizer.tokenizer import Tokenizer

_STATE, _TENSORS, _FORMAT = "state.json", "training.safetensors", "tinygpt training 1"


def newest(run: Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        InputError: when a run has none, or its `last` names what is not there.
    """
    if last := checkpoint_in(run, "last"):
        return last
    raise InputError(f"{run} has no checkpoint to go on from: leave --resume out")


def save(
    run: Path,
    model: GPT,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and let `last` name it.

    Args:
        run: the run's folder, made if need be.
        tensors: float32, what training depends on besides the weights.
        state: fit for JSON; `step` names the checkpoint.
    Returns:
        the checkpoint's folder.
    Raises:
        InputError: when it cannot be written; the checkpoints before stay as they are.
    """
    final = run / f"step-{state['step']:08d}"
    temporary = temporary_beside(final)
    try:
        model.save_pretrained(temporary, tokenizer)
        layout = {name: ("F32", tensor.shape) for name, tensor in tensors.items()}
        safetensors_file.write(temporary / _TENSORS, layout, lambda name: tensors[name].numpy())
        write_text(temporary / _STATE, json.dumps({"format": _FORMAT, **state}, indent=1) + "\n")
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
            file.write(f"{folder.name}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():  # in a copy whose links were followed
            os.rename(path, temporary_beside(path))
        os.replace(temporary, path)  # this replaces an older run's link, and not what it leads to
        sync_folder(run)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {reason(error)}") from error


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, those that have names, and what a crash left."""
    named = {found.resolve() for name in NAMES if (found := checkpoint_in(run, name))}
    old = sorted(run.glob("step-*"))[:-keep]
    for path in [*old, *run.glob(TEMPORARY)]:
        if path.is_file():
            path.unlink(missing_ok=True)
        elif path.resolve() not in named:
            shutil.rmtree(path, ignore_errors=True)


def load(folder: Path) -> tuple[GPT, dict[str, np.ndarray], dict[str, Any]]:
    """The model, tensors and state that `save` wrote.

    Raises:
        CheckpointError: when something is missing or damaged.
    """
    path = folder / _STATE
    state = read_json(path)
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: its format is {show(state.get('format'))}, not {_FORMAT!r}: to train a "
            "model that is not a checkpoint of training, pass it as --model"
        )
    infos, _ = safetensors_file.read_header(folder / _TENSORS)
    arrays = {name: read_tensor(folder / _TENSORS, info) for name, info in infos.items()}
    return GPT.from_pretrained(folder, "float32"), arrays, state


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
