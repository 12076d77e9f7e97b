"""torch's files, which `torch.save` writes: a zip archive of a pickle and the tensors' bytes.

The archive is never unpacked. Its list of contents is checked, the pickle goes through `unpickle`,
and each tensor it names becomes a range of bytes in the file. Source: torch/serialization.py; the
zip format, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from tinygpt.checkpoints import unpickle
from tinygpt.checkpoints.stored_tensor import MAX_ELEMENTS, MAX_TENSORS, SIZES, TensorInfo
from tinygpt.checkpoints.unpickle import TorchTensor
from tinygpt.errors import CheckpointError, reason, show
from tinygpt.storage import need

_MAX_LIST_BYTES = 4 << 20  # of the archive's list of contents: some 40,000 entries
_LOCAL = struct.Struct("<4s5H3I2H")  # stands before each entry's name, extra field and bytes
# How a file by torch before 1.6 begins, pickles one after the other. Source: `MAGIC_NUMBER`.
OLD_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """The tensors of a state dict in a torch file, and what was saved beside it.

    The state dict is what was saved, or in what was saved under `model`, `model_state_dict` or
    `state_dict`.

    Returns:
        the tensors by name, and all else that was saved by name: plain data, of any depth.
    Raises:
        CheckpointError: when the file cannot be read or any part of it is not as torch writes it,
            the names that its pickle asks for among them.
    """
    try:
        need(os.path.isfile(path), "no such file")
        with open(path, "rb") as file:
            old = file.read(len(OLD_START)) == OLD_START
            need(not old, "torch before 1.6 wrote it: load it there, and save it again")
            records = _records(file)
            pickle = [name for name in records if name.count("/") == 1 and name[-9:] == "/data.pkl"]
            need(len(pickle) == 1, "no torch file: it must hold one folder with one data.pkl")
            folder = pickle[0].removesuffix("data.pkl")
            order = records.get(f"{folder}byteorder")
            need(order is None or _read(file, order) == b"little", "its byte order is not little")
            saved = unpickle.load(_read(file, records[pickle[0]]))
        state, rest = _state_dict(saved)
        tensors = {name: _place(name, t, folder, records) for name, t in state.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    return tensors, rest


class _Listing:
    """The file as zipfile sees it: so that no list of contents is read that fills the memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        data = self.file.read(_MAX_LIST_BYTES + 1 if count < 0 else min(count, _MAX_LIST_BYTES + 1))
        need(len(data) <= _MAX_LIST_BYTES, "its list of contents is too long")
        return data


def _records(file: BinaryIO) -> dict[str, tuple[int, ZipInfo]]:
    """Each entry of the archive by its name: where its bytes begin, and what the list says."""
    try:
        with ZipFile(_Listing(file)) as archive:
            entries = archive.infolist()
    # zipfile raises NotImplementedError for an archive of a version that it does not know.
    except (BadZipFile, NotImplementedError, OverflowError, struct.error) as error:
        raise ValueError(f"its zip archive is damaged: {reason(error)}") from error
    records: dict[str, tuple[int, ZipInfo]] = {}
    spans = []
    for entry in entries:
        name = entry.orig_filename
        folder, _, rest = name.partition("/")
        inside = rest or folder  # the folder may be called as any file is
        plain = inside.isprintable() and ":" not in inside and "\\" not in name
        if not plain or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"the entry {show(name)} is no plain name in a folder")
        need(name not in records, f"the entry {show(name)} is there twice")
        stored = entry.compress_type == ZIP_STORED and entry.file_size == entry.compress_size
        if not stored or entry.flag_bits & 1:
            raise ValueError(f"{show(name)} is compressed or encrypted")
        start = _start(file, entry)
        records[name] = start, entry
        spans.append((entry.header_offset, start + entry.file_size, name))
    spans.sort()
    ends = [0, *(end for _, end, _ in spans)]
    for (start, _, name), before in zip(spans, ends, strict=False):
        need(start >= before, f"the entry {show(name)} overlaps another")
    need(ends[-1] <= os.fstat(file.fileno()).st_size, "the file is cut")
    return records


def _start(file: BinaryIO, entry: ZipInfo) -> int:
    """Where an entry's bytes begin: after a header of its own, which must have the same name."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL.size)
    need(len(header) == _LOCAL.size, "the file is cut")
    magic, _, _, method, *_, name_length, extra_length = _LOCAL.unpack(header)
    same = file.read(name_length) == entry.orig_filename.encode()
    good = magic == b"PK\3\4" and method == ZIP_STORED and same
    need(good, f"the entry {show(entry.orig_filename)} differs from the list of contents")
    return entry.header_offset + _LOCAL.size + name_length + extra_length


def _read(file: BinaryIO, record: tuple[int, ZipInfo]) -> bytes:
    """A small entry's bytes, checked against its sum."""
    start, entry = record
    most = unpickle.MAX_BYTES
    need(entry.file_size <= most, f"{show(entry.filename)} has more than {most >> 20} MiB")
    file.seek(start)
    data = file.read(entry.file_size)
    need(zlib.crc32(data) == entry.CRC, f"{show(entry.filename)} is damaged: fetch it again")
    return data


def _state_dict(saved: Any) -> tuple[dict[str, TorchTensor], dict[str, Any]]:
    """What was saved, parted into the model's tensors and the rest."""
    need(type(saved) is dict, f"it holds {show(saved)}, not a state dict")
    rest: dict[str, Any] = {}
    for key in ("model", "model_state_dict", "state_dict"):
        if type(saved.get(key)) is dict:
            saved, rest = saved[key], {k: v for k, v in saved.items() if k != key}
            break
    many = f"it holds {len(saved)} tensors: at most {MAX_TENSORS} are read"
    need(len(saved) <= MAX_TENSORS, many)
    for name, value in saved.items():
        if type(name) is not str or not isinstance(value, TorchTensor):
            raise ValueError(f"{show(name)} is {show(value)}, not a tensor: give a state dict")
    return saved, rest


def _place(
    name: str, tensor: TorchTensor, folder: str, records: dict[str, tuple[int, ZipInfo]]
) -> TensorInfo:
    """Where in the file a tensor's numbers lie, all of them inside its storage."""
    label, storage = f"tensor {show(name)}:", tensor.storage
    record = records.get(f"{folder}data/{storage.key}")
    if record is None:
        raise ValueError(f"{label} no storage {show(storage.key)}")
    begin, entry = record
    item_bytes = SIZES[storage.dtype]
    if storage.size * item_bytes != entry.file_size:
        fact = f"{storage.size} of {storage.dtype} are not {entry.file_size} bytes"
        raise ValueError(f"{label} {fact}")
    span = _span(label, tensor)
    if tensor.offset + span > storage.size:
        raise ValueError(f"{label} reaches past its storage of {storage.size}")
    start = begin + tensor.offset * item_bytes
    end = start + span * item_bytes
    return TensorInfo(storage.dtype, tensor.shape, start, end, _strides(tensor))


def _span(label: str, tensor: TorchTensor) -> int:
    """How many numbers of its storage lie from a tensor's first to its last."""
    count = math.prod(max(n, 1) for n in tensor.shape)
    if count > MAX_ELEMENTS:
        raise ValueError(f"{label} shape {show(tensor.shape)} is too large")
    if 0 in tensor.shape:
        return 0
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if span < count:  # numbers that lie over one another
        fact = f"shape {show(tensor.shape)} with strides {show(tensor.strides)}"
        raise ValueError(f"{label} {fact}")
    return span


def _strides(tensor: TorchTensor) -> tuple[int, ...] | None:
    """The strides, None where they are those of rows without gaps."""
    usual, step = [], 1
    for n in reversed(tensor.shape):
        usual.append(step)
        step *= n
    steps = zip(tensor.shape, tensor.strides, reversed(usual), strict=True)
    return None if all(n == 1 or one == other for n, one, other in steps) else tensor.strides
