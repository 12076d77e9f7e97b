"""torch's files, which `torch.save` writes: a zip archive of a pickle and the tensors' bytes.

The archive is never unpacked. Its list of contents is checked, the pickle goes through `unpickle`,
and each tensor it names becomes a range of bytes in the file. Before 1.6 torch wrote a row of
pickles instead, and the tensors' bytes after them; those are read by the same machine. Source:
torch/serialization.py; the zip format, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
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
from tinygpt.checkpoints.pickled_names import Record, TorchTensor
from tinygpt.checkpoints.stored_tensor import MAX_ELEMENTS, MAX_TENSORS, SIZES, TensorInfo
from tinygpt.errors import CheckpointError, reason, show
from tinygpt.storage import need, open_plain

_MAX_LIST_BYTES = 4 << 20  # of the archive's list of contents: some 40,000 entries
_LOCAL = struct.Struct("<4s5H3I2H")  # stands before each entry's name, extra field and bytes
# How a file by torch before 1.6 begins: a pickle of this number, then one of the form's version.
# Source: `MAGIC_NUMBER`, `PROTOCOL_VERSION`.
OLD_START, _OLD_VERSION = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", 1001
Places = dict[str, tuple[int, int]]  # a storage's key -> where its bytes begin, how many they are


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
        with open_plain(path) as file:
            old = file.read(len(OLD_START)) == OLD_START
            saved, places = _old_content(file) if old else _zip_content(file)
        state, rest = _state_dict(saved)
        tensors = {name: _place(name, t, places) for name, t in state.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    return tensors, rest


def _zip_content(file: BinaryIO) -> tuple[Any, Places]:
    """What was saved, and where each storage lies."""
    records = _records(file)
    pickle = [name for name in records if name.count("/") == 1 and name[-9:] == "/data.pkl"]
    arrays = not pickle and any(name.endswith(".npy") for name in records)
    need(not arrays, "it holds arrays of NumPy, no model: give a model's folder or file")
    need(len(pickle) == 1, "no torch file: it must hold one folder with one data.pkl")
    folder = pickle[0].removesuffix("data.pkl")
    order = records.get(f"{folder}byteorder")
    need(order is None or _read(file, order) == b"little", "its byte order is not little")
    inside = f"{folder}data/"
    places = {
        name.removeprefix(inside): (start, entry.file_size)
        for name, (start, entry) in records.items()
        if name.startswith(inside)
    }
    return unpickle.load(_read(file, records[pickle[0]])), places


def _old_content(file: BinaryIO) -> tuple[Any, Places]:
    """As `_zip_content`, of what torch wrote before 1.6; the file stands after OLD_START.

    Four pickles: the form's version, the machine, what was saved, and the keys of the storages.
    Each storage comes after them in that order, behind its number of elements.
    """
    begin = file.tell()
    (version, machine, saved, keys), storages, length = unpickle.load_row(
        file.read(unpickle.MAX_BYTES), 4
    )
    if version != _OLD_VERSION:
        raise ValueError(f"it is of torch's version {show(version)}, not {_OLD_VERSION}")
    little = type(machine) is dict and machine.get("little_endian") is True
    need(little, "its byte order is not little")
    # Other keys, such as tuples of tuples, could take for ever to hash.
    good = type(keys) is list and all(type(key) is str for key in keys)
    need(good and sorted(keys) == sorted(storages), "its list of storages is not theirs")
    places, at, size = {}, begin + length, os.fstat(file.fileno()).st_size
    for key in keys:
        file.seek(at)
        count, storage = int.from_bytes(file.read(8), "little"), storages[key]
        if count != storage.size:
            raise ValueError(f"its storage {show(key)} has {count} elements, not {storage.size}")
        places[key] = at + 8, count * SIZES[storage.dtype]
        at += 8 + places[key][1]
        need(at <= size, "the file is cut")
    need(at == size, f"its tensors end at byte {at}, but it has {size} bytes: fetch it again")
    return saved, places


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
        fact = f"its zip archive is damaged or cut: {reason(error)}"
        raise ValueError(f"{fact}; fetch it again, or give another file") from error
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
            fact = f"{show(name)} is compressed or encrypted"
            raise ValueError(f"{fact}, which torch never does: unpack an archive of a model first")
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
    advice = "give a state dict, as torch.save(model.state_dict(), PATH) writes it"
    if type(saved) is not dict:
        raise ValueError(f"it holds {show(saved)}, not a state dict: {advice}")
    rest: dict[str, Any] = {}
    for key in ("model", "model_state_dict", "state_dict", "module"):
        if isinstance(inner := saved.get(key), Record):
            raise ValueError(f"its {key} is {show(inner)}: {advice}")
        if type(inner) is dict:
            saved, rest = inner, {k: v for k, v in saved.items() if k != key}
            break
    if "param_groups" in saved:
        raise ValueError("it holds the state of an optimizer: give the file with the model")
    many = f"it holds {len(saved)} tensors: at most {MAX_TENSORS} are read"
    need(len(saved) <= MAX_TENSORS, many)
    for name, value in saved.items():
        if type(name) is not str or not isinstance(value, TorchTensor):
            raise ValueError(f"{show(name)} is {show(value)}, not a tensor: {advice}")
    return saved, rest


def _place(name: str, tensor: TorchTensor, places: Places) -> TensorInfo:
    """Where in the file a tensor's numbers lie, all of them inside its storage."""
    label, storage = f"tensor {show(name)}:", tensor.storage
    if storage.key not in places:
        raise ValueError(f"{label} no storage {show(storage.key)}")
    begin, size_bytes = places[storage.key]
    item_bytes = SIZES[storage.dtype]
    if storage.size * item_bytes != size_bytes:
        fact = f"{storage.size} of {storage.dtype} are not {size_bytes} bytes"
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
