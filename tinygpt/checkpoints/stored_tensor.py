"""A tensor in a file: where its bytes lie, and reading them. All forms of checkpoints meet here."""

from __future__ import annotations

import math
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinygpt.errors import CheckpointError, reason
from tinygpt.storage import open_plain

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


def read_tensor(source: str | Path | BinaryIO, info: TensorInfo, fresh: bool = True) -> np.ndarray:
    """Read one tensor, and nothing else of the file.

    Args:
        source: the file that `info` was read from, as a path or opened for binary reading.
        fresh: into memory of the array's own. If not, it may be the file's pages, which cannot be
            written to, and are to be let go before the file is.
    Returns:
        an array of info.shape; BF16 comes as float32, the rest as the NumPy type of that name. Of
        a type made of blocks (see `gguf_file`) the bytes alone: uint8 (end - start,).
    Raises:
        CheckpointError: when the file can no longer be read or has become shorter.
    """
    try:
        if isinstance(source, str | Path):
            with open_plain(source) as file:
                return read_tensor(file, info, fresh)
        raw = _mapped(source, info)
        raw = raw.copy() if fresh else raw
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


def _mapped(file: BinaryIO, info: TensorInfo) -> np.ndarray:
    """A tensor's bytes as the system holds them, which need no memory of their own: uint8, to read.

    Where a file cannot be mapped, they are read.
    """
    size = file.seek(0, os.SEEK_END)
    if size < info.end:
        raise OSError(f"it ends {info.end - size} bytes too early; fetch it again")
    start = info.start - info.start % mmap.ALLOCATIONGRANULARITY
    with suppress(OSError, ValueError):  # an empty one; or no plain file
        length = info.end - start
        pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(pages, np.uint8, info.size_bytes, info.start - start)
    file.seek(info.start)
    return np.frombuffer(file.read(info.size_bytes), np.uint8)


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
