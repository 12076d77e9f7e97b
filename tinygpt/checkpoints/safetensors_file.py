"""The safetensors file format: a reader that trusts nothing and a writer that never half-writes.

A file is eight bytes of header length (little-endian), that many bytes of JSON, then the tensors'
bytes end to end. Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.checkpoints.stored_tensor import (
    DTYPES,
    MAX_ELEMENTS,
    MAX_RANK,
    MAX_TENSORS,
    SIZES,
    TensorInfo,
    to_bfloat16,
)
from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.storage import LONG_BYTES, atomic_file, byte_bar, need, open_plain, parse_json

# The reference implementation reads twelve times as much; as Python objects that is gigabytes.
_MAX_HEADER_BYTES = 8 << 20


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What a file holds, every claim checked against the file before any data is used.

    Returns:
        the tensors by name, and the file's metadata.
    Raises:
        CheckpointError: when the file cannot be read or any part of its header is wrong.
    """
    try:
        header, data_start, size = _read_json(path)
        metadata = header.pop("__metadata__", {})
        text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        need(text, "__metadata__ must map text to text")
        many = f"it has {len(header)} tensors: at most {MAX_TENSORS} are read"
        need(len(header) <= MAX_TENSORS, many)
        tensors = {name: _entry(name, entry, data_start) for name, entry in header.items()}
        _need_end_to_end(tensors, data_start, size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    return tensors, metadata


def _read_json(path: str | Path) -> tuple[dict[str, Any], int, int]:
    """The header as JSON, where it ends in the file, and the file's size."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        need(size >= 8, f"{size} bytes are too few for a safetensors file")
        length = int.from_bytes(file.read(8), "little")
        fact = f"it is cut or no safetensors file: {length} bytes of header in a file of {size}"
        need(length <= min(size - 8, _MAX_HEADER_BYTES), fact)
        return parse_json(file.read(length)), 8 + length, size


def _need_end_to_end(tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Refuse tensors that overlap, or leave bytes of the file to none of them."""
    at = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            fault = "overlaps the one before" if info.start < at else "leaves a gap before it"
            raise ValueError(f"tensor {show(name)} {fault}")
        at = info.end
    need(at == size, f"its tensors end at byte {at}, but it has {size} bytes: fetch it again")


def _entry(name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's entry in the header, checked on its own."""
    label, keys = f"tensor {show(name)}:", {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(f"{label} needs exactly {sorted(keys)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise ValueError(f"{label} dtype {show(dtype)} is unsupported: allowed are {allowed}")
    if not _are_counts(shape):
        raise ValueError(f"{label} shape {show(shape)} must be a list of whole numbers, 0 or more")
    # Zeros count as ones here: NumPy refuses an empty array whose other dimensions overflow.
    if len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise ValueError(f"{label} shape {show(shape)} is too large")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{label} data_offsets {show(offsets)} must be a start and an end")
    start, end = offsets
    if end - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"{label} {dtype} {show(shape)} is not {show(end - start)} bytes")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _are_counts(numbers: Any) -> bool:
    """Whether it is a list of whole numbers, 0 or more; to JSON's readers, true is none."""
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def write(
    path: str | Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    value: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file whole or not at all, holding one tensor in memory at a time.

    Args:
        path: the file to make or replace.
        layout: each tensor's name -> (dtype as the format spells it, such as "F32"; shape).
        value: gives a name's array; called once for each, when its turn to be written comes. For
            arrays in a dict it is `arrays.__getitem__`. BF16 is given as float32; floats are
            rounded to the layout's type, to nearest even.
        metadata: text to text, kept in the header.
    Raises:
        InputError: when the file cannot be written, or a value is too large for its dtype.
    """
    # Widest type first, as the reference writer does: so every tensor is aligned to its type.
    order = sorted(layout, key=lambda name: -SIZES[layout[name][0]])
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    at = 0
    for name in order:
        dtype, shape = layout[name]
        start, at = at, at + math.prod(shape) * SIZES[dtype]
        assert name not in header, name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, at]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file, byte_bar(f"writing {Path(path).name}", at, LONG_BYTES) as bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype, shape = layout[name]
            array = np.asarray(value(name))
            assert array.shape == tuple(shape), (name, array.shape, shape)
            try:
                with np.errstate(over="raise"):
                    array = to_bfloat16(array) if dtype == "BF16" else array
                    rule = "same_kind" if dtype.startswith("F") else "safe"  # integers would wrap
                    array = array.astype(DTYPES[dtype], casting=rule, copy=False)
            except FloatingPointError as error:
                raise InputError(f"tensor {name} has values too large for {dtype}") from error
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            bar.update(array.nbytes)
