"""The safetensors file format: a reader that trusts nothing and a writer that never half-writes.

A file is eight bytes of header length (little-endian), that many bytes of JSON, then the tensors'
bytes end to end. Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinygpt.config import InputError, show
from tinygpt.files import CheckpointError, atomic_file, parse_json, reason

_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's cap
_MAX_RANK, _MAX_ELEMENTS = 32, 2**48  # what every NumPy can hold, also as an empty array
_DTYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2"}
_DTYPES |= {"U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8"}
_DTYPES |= {"BF16": "<u2"}  # a float32's upper half, which NumPy has no type for
_SIZES = {name: np.dtype(spelled).itemsize for name, spelled in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: its bytes are `start` to `end`, counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What a file holds, every claim checked against the file before any data is used.

    Returns:
        the tensors by name, and the file's metadata.
    Raises:
        CheckpointError: when the file cannot be read or any part of its header is wrong.
    """
    try:
        _need(os.path.isfile(path), "no such file")  # a pipe would block in open()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _need(size >= 8, f"{size} bytes are too few for a safetensors file")
            length = int.from_bytes(file.read(8), "little")
            fact = f"it is cut or no safetensors file: {length} bytes of header in a file of {size}"
            _need(length <= min(size - 8, _MAX_HEADER_BYTES), fact)
            header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        _need(text, "__metadata__ must map text to text")
        tensors = {name: _entry(name, entry, 8 + length) for name, entry in header.items()}
        at = 8 + length
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            fault = "overlaps the one before" if info.start < at else "leaves a gap before it"
            _need(info.start == at, f"tensor {show(name)} {fault}")
            at = info.end
        _need(at == size, f"its tensors end at byte {at}, but it has {size} bytes: fetch it again")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    return tensors, metadata


def _need(condition: bool, fact: str) -> None:
    if not condition:
        raise ValueError(fact)


def _entry(name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's entry in the header, checked on its own."""
    label = f"tensor {show(name)}:"
    keys = {"dtype", "shape", "data_offsets"}
    _need(isinstance(entry, dict) and set(entry) == keys, f"{label} needs exactly {sorted(keys)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in _DTYPES
    _need(known, f"{label} dtype {show(dtype)} is unsupported: allowed are {', '.join(_DTYPES)}")
    counts = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    _need(counts, f"{label} shape {show(shape)} must be a list of whole numbers, 0 or more")
    # Zeros count as ones here: NumPy refuses an empty array whose other dimensions overflow.
    fits = len(shape) <= _MAX_RANK and math.prod(max(n, 1) for n in shape) <= _MAX_ELEMENTS
    _need(fits, f"{label} shape {show(shape)} is too large")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    ordered = pair and 0 <= offsets[0] <= offsets[1]
    _need(ordered, f"{label} data_offsets {show(offsets)} must be a start and an end")
    taken, start, end = math.prod(shape) * _SIZES[dtype], *offsets
    _need(end - start == taken, f"{label} {dtype} {show(shape)} is not {show(end - start)} bytes")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def read_tensor(source: str | Path | BinaryIO, info: TensorInfo) -> np.ndarray:
    """Read one tensor into a fresh array, and nothing else of the file.

    Args:
        source: the file that `info` was read from, as a path or opened for binary reading.
    Returns:
        an array of info.shape; BF16 comes as float32, the rest as the NumPy type of that name.
    Raises:
        CheckpointError: when the file can no longer be read or has become shorter.
    """
    try:
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                return read_tensor(file, info)
        raw = np.empty(info.end - info.start, np.uint8)
        rest = memoryview(raw)
        source.seek(info.start)
        while rest and (count := source.readinto(rest)):  # a read may give less than asked for
            rest = rest[count:]
        if rest:
            raise OSError(f"it ends {len(rest)} bytes too early; fetch it again")
    except OSError as error:
        name = getattr(source, "name", source)
        raise CheckpointError(f"{name}: {reason(error)}") from error
    if info.dtype == "BOOL":
        return (raw != 0).reshape(info.shape)
    array = raw.view(_DTYPES[info.dtype]).reshape(info.shape)
    if info.dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


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
    order = sorted(layout, key=lambda name: -_SIZES[layout[name][0]])
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    at = 0
    for name in order:
        dtype, shape = layout[name]
        start, at = at, at + math.prod(shape) * _SIZES[dtype]
        assert name not in header, name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, at]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype, shape = layout[name]
            array = np.asarray(value(name))
            assert array.shape == tuple(shape), (name, array.shape, shape)
            try:
                with np.errstate(over="raise"):
                    array = to_bfloat16(array) if dtype == "BF16" else array
                    rule = "same_kind" if dtype.startswith("F") else "safe"  # integers would wrap
                    array = array.astype(_DTYPES[dtype], casting=rule, copy=False)
            except FloatingPointError as error:
                raise InputError(f"tensor {name} has values too large for {dtype}") from error
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest, a tie to the even one; as uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).reshape(array.shape)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF  # carries into the upper half from just above a tie, or at one if odd
    rounded += bits
    rounded >>= 16
    # The carry could make an infinity of a NaN, so those are cut, and stay NaNs by one set bit.
    return np.where(np.isnan(array), bits >> 16 | 0x40, rounded).astype(np.uint16)
