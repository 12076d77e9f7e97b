"""A tensor in a file: where its bytes lie, and reading them. All forms of checkpoints meet here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinygpt.errors import CheckpointError, reason

# The types that a tensor may have in a file, as safetensors spells them -> NumPy's.
DTYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2"}
DTYPES |= {"U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8"}
DTYPES |= {"BF16": "<u2"}  # a float32's upper half, which NumPy has no type for
SIZES = {name: np.dtype(spelled).itemsize for name, spelled in DTYPES.items()}
MAX_RANK, MAX_ELEMENTS = 32, 2**48  # every NumPy can hold so much, also as an empty array
MAX_TENSORS = 20_000  # in a file: GPT-2 XL's, with its optimizer's, are 2,400


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: its bytes are `start` to `end`, counted from the file's beginning."""

    dtype: str  # one of DTYPES, or of `gguf_file.BLOCKS`
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None  # in elements; None: row after row, without gaps

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """How much of the file it takes."""
        return self.end - self.start


def read_tensor(source: str | Path | BinaryIO, info: TensorInfo) -> np.ndarray:
    """Read one tensor into a fresh array, and nothing else of the file.

    Args:
        source: the file that `info` was read from, as a path or opened for binary reading.
    Returns:
        an array of info.shape; BF16 comes as float32, the rest as the NumPy type of that name. Of
        a type made of blocks (see `gguf_file`) the bytes alone: uint8 (end - start,).
    Raises:
        CheckpointError: when the file can no longer be read or has become shorter.
    """
    try:
        if isinstance(source, str | Path):
            with open(source, "rb") as file:
                return read_tensor(file, info)
        raw = np.empty(info.size_bytes, np.uint8)
        rest = memoryview(raw)
        source.seek(info.start)
        while rest and (count := source.readinto(rest)):  # a read may give less than asked for
            rest = rest[count:]
        if rest:
            raise OSError(f"it ends {len(rest)} bytes too early; fetch it again")
    except OSError as error:
        name = getattr(source, "name", source)
        raise CheckpointError(f"{name}: {reason(error)}") from error
    if info.dtype not in DTYPES:
        return raw
    array = (raw != 0) if info.dtype == "BOOL" else raw.view(DTYPES[info.dtype])
    if info.strides is None:
        array = array.reshape(info.shape)
    else:  # whoever made the info has checked that every element lies inside
        steps = tuple(step * array.itemsize for step in info.strides)
        array = np.lib.stride_tricks.as_strided(array, info.shape, steps, writeable=False)
    if info.dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


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
