"""The GGUF file format: a reader that trusts nothing, and a writer that never half-writes.

A file is a header (version, counts), metadata by key, a list of tensors, then their bytes, each
tensor aligned. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised types
come in blocks of numbers with a scale; tinygrad computes their values.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.checkpoints.stored_tensor import MAX_ELEMENTS, MAX_TENSORS, SIZES, TensorInfo
from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.storage import LONG_BYTES, atomic_file, byte_bar, need, open_plain

MAGIC = b"GGUF"
_MAX_HEADER_BYTES = 16 << 20  # GPT-2's, with its vocabulary, takes 1.8 MB
_MAX_KEYS, _MAX_TEXTS = 10_000, 1 << 20  # keys of metadata; texts in one list of it
_ALIGNMENT = 32  # bytes, unless the file says otherwise
# Type -> (GGUF's number for it, numbers in a block, bytes of a block). Source: `GGML_QUANT_SIZES`.
_PLAIN = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2)}
BLOCKS = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}
_TYPES = _PLAIN | BLOCKS
_NAMES = {number: name for name, (number, *_) in _TYPES.items()}
# A value's type -> how `struct` spells it.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """What a file holds, every count and length checked against the file before it is used.

    Returns:
        the tensors by name, shapes as (rows, columns); and the metadata: numbers, texts, lists of
        texts, and arrays of numbers.
    Raises:
        CheckpointError: when the file cannot be read or any part of its header is wrong.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = _Head(file.read(_MAX_HEADER_BYTES), size)
        need(head.take(4) == MAGIC, "no GGUF file")
        version, tensors, values = head.number("I"), head.number("Q"), head.number("Q")
        need(version in (2, 3), f"GGUF of version {version}: only 2 and 3 can be read")
        metadata: dict[str, Any] = {}
        for what, count, most in (("keys", values, _MAX_KEYS), ("tensors", tensors, MAX_TENSORS)):
            need(count <= most, f"it claims {count} {what}: at most {most} are read")
        for _ in range(head.count(values, 13)):  # the shortest key and value take 13 bytes
            key = head.text()
            if key in metadata:
                raise ValueError(f"the key {show(key)} appears twice")
            metadata[key] = head.value(head.number("I"))
        entries = [_entry(head) for _ in range(head.count(tensors, 24))]
        return _place(entries, metadata, head.at, size), metadata
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error


class _Head:
    """The beginning of a file, taken piece by piece."""

    def __init__(self, data: bytes, file_size: int) -> None:
        self.data, self.at, self.file_size = data, 0, file_size

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            whole = len(self.data) == self.file_size
            most = f"more than {_MAX_HEADER_BYTES >> 20} MiB of header"
            raise ValueError("it is cut, or a length in it is wrong" if whole else most)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number, of a type as `struct` spells it."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, claimed: int, least_bytes: int) -> int:
        """A count of things to come, if there is room for so many."""
        left = (len(self.data) - self.at) // least_bytes
        need(claimed <= left, f"it claims {claimed} entries, where {left} are all that could come")
        return claimed

    def text(self) -> str:
        """The next text, after its length."""
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the text {show(data)} in it is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """The next value of metadata, of this type."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _TEXT:
                count = self.count(count, 8)
                need(count <= _MAX_TEXTS, f"a list of {count} texts: at most {_MAX_TEXTS} are read")
                return [self.text() for _ in range(count)]
            need(kind in _NUMBERS, f"an array of type {kind} is neither of numbers nor of texts")
            item = np.dtype(f"<{_NUMBERS[kind]}")
            return np.frombuffer(self.take(self.count(count, item.itemsize) * item.itemsize), item)
        need(kind in _NUMBERS, f"metadata of type {kind}, which GGUF does not have")
        return self.number(_NUMBERS[kind])


def _entry(head: _Head) -> tuple[str, tuple[int, ...], str, int]:
    """One entry of the list of tensors: name, shape, type, and offset into the tensors' bytes."""
    name, rank = head.text(), head.number("I")
    label = f"tensor {show(name)}:"
    if not 1 <= rank <= 4:
        raise ValueError(f"{label} {rank} dimensions: there are 1 to 4")
    shape = tuple(head.number("Q") for _ in range(rank))[::-1]  # the file has columns first
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise ValueError(f"{label} shape {show(shape)} is too large")
    kind, offset = head.number("I"), head.number("Q")
    if kind not in _NAMES:
        raise ValueError(f"{label} type {kind} is unsupported: allowed are {', '.join(_TYPES)}")
    columns = _TYPES[_NAMES[kind]][1]
    if shape[-1] % columns:
        raise ValueError(f"{label} rows of {shape[-1]} in blocks of {columns}")
    return name, shape, _NAMES[kind], offset


def _place(
    entries: Sequence[tuple[str, tuple[int, ...], str, int]],
    metadata: Mapping[str, Any],
    header_end: int,
    file_size: int,
) -> dict[str, TensorInfo]:
    """Where in the file each tensor lies: inside it, aligned, and none over another."""
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
        raise ValueError(f"general.alignment is {show(alignment)}: it must be a multiple of 8")
    begin = header_end + -header_end % alignment
    found: dict[str, TensorInfo] = {}
    at, before = begin, "the header"
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        label, start = f"tensor {show(name)}", begin + offset
        end = start + _size_bytes(kind, shape)
        if name in found:
            raise ValueError(f"{label} is there twice")
        if offset % alignment:
            raise ValueError(f"{label} is not aligned to {alignment} bytes")
        if start < at:
            raise ValueError(f"{label} overlaps {before}")
        if end > file_size:
            raise ValueError(f"{label} ends at byte {end} of {file_size}: fetch it again")
        found[name] = TensorInfo(kind, shape, start, end)
        at, before = end, label
    return found


def _size_bytes(kind: str, shape: Sequence[int]) -> int:
    _, numbers, size = _TYPES[kind]
    return math.prod(shape) // numbers * size


def dequantize(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The values of a tensor of one of BLOCKS, which tinygrad computes from its blocks.

    Args:
        raw: uint8 (n,), the tensor's bytes.
    Returns:
        float32 of info.shape.
    """
    # Imported here, because reading a tokenizer does not need it.
    from tinygrad.llm.gguf import ggml_data_to_tensor

    from tinygpt.runtime.buffers import tensor

    if info.size == 0:
        return np.zeros(info.shape, np.float32)
    values = ggml_data_to_tensor(tensor(raw), info.size, BLOCKS[info.dtype][0])
    return values.float().numpy().reshape(info.shape)


def quantize_q8_0(weight: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers, each a float16 scale and 32 int8: float32 (m, n) -> uint8 (m, bytes).

    Source: ggml/src/ggml-quants.c, `quantize_row_q8_0_ref`: scale = max |x| / 127, and x / scale
    rounded to nearest, halves away from zero.
    """
    blocks = np.ascontiguousarray(weight, np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    whole = np.trunc(scaled)
    rounded = whole + np.trunc(2 * (scaled - whole))
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise InputError("a weight is too large for Q8_0: choose float32")
    parts = half.view(np.uint8), rounded.astype(np.int8).view(np.uint8)
    return np.concatenate(parts, axis=1).reshape(len(weight), -1)


def write(
    path: str | Path,
    metadata: Mapping[str, Any],
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    value: Callable[[str], np.ndarray],
) -> None:
    """Write a file whole or not at all, holding one tensor in memory at a time.

    Args:
        path: the file to make or replace.
        metadata: key -> text, bool, whole number, float, or a list of texts or whole numbers.
        layout: each tensor's name -> (type: F32, F16 or Q8_0; shape).
        value: gives a name's float array; called once for each, in the layout's order.
    Raises:
        InputError: when the file cannot be written, or a value is too large for its type.
    """
    head = [MAGIC, struct.pack("<IQQ", 3, len(layout), len(metadata))]
    for key, content in metadata.items():
        head += [_text(key), _value(content)]
    at = 0
    for name, (kind, shape) in layout.items():
        head += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        head.append(struct.pack("<IQ", _TYPES[kind][0], at))
        at += _padded(_size_bytes(kind, shape))
    start = b"".join(head)
    with atomic_file(path) as file, byte_bar(f"writing {Path(path).name}", at, LONG_BYTES) as bar:
        file.write(start.ljust(_padded(len(start)), b"\0"))
        for name, (kind, shape) in layout.items():
            array = value(name)
            assert array.shape == shape, (name, array.shape, shape)
            data = _stored(name, array, kind).tobytes()
            bar.update(file.write(data.ljust(_padded(len(data)), b"\0")))


def _stored(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "Q8_0":
        return quantize_q8_0(array)
    with np.errstate(over="ignore"):
        stored = array.astype(f"<f{SIZES[kind]}")
    if kind == "F16" and not np.isfinite(stored).all():
        raise InputError(f"tensor {name} has values too large for F16: choose float32")
    return stored


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(content: Any) -> bytes:
    """A value of metadata, after its type."""
    if isinstance(content, str):
        return struct.pack("<I", _TEXT) + _text(content)
    if isinstance(content, list):
        texts = all(isinstance(item, str) for item in content)
        items = [_text(item) if texts else struct.pack("<i", item) for item in content]
        head = struct.pack("<IIQ", _ARRAY, _TEXT if texts else _INT32, len(content))
        return head + b"".join(items)
    kind = {bool: _BOOL, int: _UINT32, float: _FLOAT32}[type(content)]
    return struct.pack(f"<I{_NUMBERS[kind]}", kind, content)
