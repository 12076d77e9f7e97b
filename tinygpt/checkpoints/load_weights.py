"""The weights of an opened checkpoint, of any form, read into a model of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from tinygrad.nn.state import get_state_dict

from tinygpt.checkpoints import gguf_file
from tinygpt.checkpoints.quantization import (
    DTYPES,
    check_dtype,
    matrices,
    set_weight,
    supported,
)
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.errors import CheckpointError, InputError
from tinygpt.model import GPT
from tinygpt.runtime import buffers, device
from tinygpt.storage import LONG_BYTES, byte_bar

if TYPE_CHECKING:
    from tinygrad.helpers import tqdm

    from tinygpt.checkpoints.open_checkpoint import Checkpoint

_THREADS = 2  # tensors that are read and converted at a time
# How a matrix is held by how it is stored; all other types are held in float32.
_HELD = {"F16": "float16", "BF16": "bfloat16", "I8": "int8"}


def load_weights(
    found: Checkpoint, dtype: str | None = None, place: Callable[[GPT], None] | None = None
) -> GPT:
    """A model with the weights of an opened checkpoint.

    Args:
        dtype: what to hold matrices in, one of `quantization.DTYPES`; None takes what each is
            stored in, or float32 where that is made of blocks or the backend cannot.
        place: what lays the model on several devices, before it has values: see `devices`.
    Raises:
        InputError: when the dtype is none, or the model cannot be held in memory.
        CheckpointError: when the files are damaged, or hold what is no number.
    """
    if dtype is not None:
        check_dtype(dtype)
    held = {name: dtype or _as_stored(info.dtype) for name, (_, info) in found.tensors.items()}
    model = GPT(found.config, seed=None)
    if place is not None:
        place(model)
    _require_memory(found, held, model)
    loader = _Loader(found, held, model)
    sizes = {name: found.tensors[name][1].size_bytes for name in loader.names}
    # One thread for what tinygrad computes, as blocks are, and for a GPU, whose driver may know
    # only the thread that began.
    alone = any(info.dtype in gguf_file.BLOCKS for _, info in found.tensors.values())
    threads = 1 if alone or device.default() != "CPU" else _THREADS
    title = f"reading {found.path.name}"
    _each(loader.load, sizes, threads, byte_bar(title, sum(sizes.values()), LONG_BYTES))
    loader.fill_missing()
    return loader.model


class _Loader:
    """Fills a model without values, one stored tensor at a time, in any order."""

    def __init__(self, found: Checkpoint, held: Mapping[str, str], model: GPT) -> None:
        self.found, self.held, self.model = found, held, model
        self.parameters, self.layers = get_state_dict(self.model), matrices(self.model)
        self.missing = set(self.parameters)
        ours = {tensor.ours[0]: name for name, tensor in found.expected.items()}
        self.scales = {name: theirs for name, theirs in ours.items() if name.endswith(".scale")}
        # A scale is read together with its weight.
        self.names = [name for name in found.expected if name not in self.scales.values()]

    def load(self, name: str) -> None:
        """Give our parameters what a stored tensor holds of them."""
        tensor, parts = self.found.expected[name], self._read(name)
        if not self.found.config.bias and tensor.ours[0] not in self.parameters:
            if any(part.any() for part in parts):
                fact = f"{name} is not zero, but config.json says no bias"
                raise CheckpointError(f"{self.found.path}: {fact}")
            return
        scale = self.scales.get(tensor.ours[0].removesuffix("weight") + "scale")
        scales = self._read(scale) if scale else [None] * len(parts)
        for our_name, part, its_scale in zip(tensor.ours, parts, scales, strict=True):
            self._set(our_name, part, its_scale, name)
            self.missing.discard(our_name)

    def _set(self, ours: str, value: np.ndarray, scale: np.ndarray | None, name: str) -> None:
        layer = self.layers.get(ours.removesuffix(".weight"))
        if layer is None:
            buffers.write(self.parameters[ours], value.astype(np.float32, copy=False))
            return
        try:
            set_weight(layer, value, self.held[name], name, scale)
        except InputError as error:
            raise CheckpointError(f"{self.found.path}: {error}") from error

    def _read(self, name: str) -> list[np.ndarray]:
        """What a stored tensor holds of ours, every number checked to be one."""
        file, info = self.found.tensors[name]
        array = read_tensor(file, info, fresh=False)
        if info.dtype in gguf_file.BLOCKS:
            array = gguf_file.dequantize(array, info)
        with np.errstate(all="ignore"):
            if info.dtype == "F64":
                # What is beyond float32's range becomes infinite here, and is refused below.
                array = array.astype(np.float32)
            # To NumPy, NaN is both the largest and the smallest of all numbers.
            finite = array.size == 0 or np.isfinite([array.max(), array.min()]).all()
        if not finite:
            fact = f"{name} has values that are infinite or not a number"
            raise CheckpointError(f"{self.found.path}: {fact}")
        parts, adapter = self.found.expected[name].split(array), self.found.adapter
        return adapter.merged(name, parts) if adapter else parts

    def fill_missing(self) -> None:
        """Zero the biases of query, key and value, which the book's form leaves out."""
        for ours in self.missing:
            parameter = self.parameters[ours]
            buffers.write(parameter, np.zeros(parameter.shape, np.float32))


def _each(load: Callable[[str], None], sizes: Mapping[str, int], threads: int, bar: tqdm) -> None:
    """Load every name, on some threads or on this one; after an error, read no further."""
    with bar, ThreadPoolExecutor(threads) as pool:
        loaded = map(load, sizes) if threads == 1 else pool.map(load, sizes)
        for size_bytes, _ in zip(sizes.values(), loaded, strict=True):
            bar.update(size_bytes)


def _require_memory(found: Checkpoint, held: Mapping[str, str], model: GPT) -> None:
    """Refuse what cannot fit, by the headers alone."""
    count = {name: math.prod(tensor.shape) for name, tensor in found.expected.items()}
    size_bytes = sum(DTYPES[held[name]].itemsize * n for name, n in count.items())
    # While a tensor is read, there are its bytes as stored and as float32; rounding it to int8
    # takes two more copies in float32.
    largest = max(
        (12 if held[name] == "int8" else 4) * count[name] + info.size_bytes
        for name, (_, info) in found.tensors.items()
    )
    model.placement.require_memory(size_bytes + _THREADS * largest, f"the model in {found.path}")


def _as_stored(dtype: str) -> str:
    held = _HELD.get(dtype, "float32")
    return held if supported(held) else "float32"
