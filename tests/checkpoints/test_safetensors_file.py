"""Files of ours and of the reference package read alike; nothing hostile gets past the header."""

from __future__ import annotations

import errno
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from tinygpt.checkpoints.safetensors_file import (
    CheckpointError,
    atomic_file,
    read_header,
    write,
)
from tinygpt.checkpoints.stored_tensor import TensorInfo, read_tensor
from tinygpt.errors import InputError

DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16"},
    **{"U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64"},
    **{"F16": "float16", "F32": "float32", "F64": "float64"},
}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def arrays() -> dict[str, np.ndarray]:
    """One tensor of each dtype and of odd shapes, so that a wrong offset cannot go unseen."""
    rng = np.random.default_rng(0)
    found = {d: (rng.normal(size=(3, 5)) * 50).astype(DTYPES[d]) for d in DTYPES if d[0] != "U"}
    found |= {d: rng.integers(0, 200, (7, 1)).astype(DTYPES[d]) for d in DTYPES if d[0] == "U"}
    return found | {"scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 4), np.int64)}


def save(path: Path, values: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    spelled = {np.dtype(numpy): name for name, numpy in DTYPES.items()}
    layout = {name: (spelled[value.dtype], value.shape) for name, value in values.items()}
    write(path, layout, values.__getitem__, metadata)


def load(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return {name: read_tensor(file, info) for name, info in read_header(path)[0].items()}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        np.testing.assert_array_equal(value, right[name], strict=True)


def put(path: Path, header: object, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    """A file with any header at all: an object to spell as JSON, or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, arrays(), {"format": "pt", "text": 'ä"\n'})
    same(load(path), arrays())
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt", "text": 'ä"\n'}
    assert tensors["scalar"].shape == ()
    for info in tensors.values():  # each aligned to its type, as readers that map files need it
        width = 1 if info.dtype == "BOOL" else int(info.dtype.strip("BUIF")) // 8
        assert info.start % width == 0
    np.testing.assert_array_equal(read_tensor(path, tensors["F64"]), arrays()["F64"])
    memory = io.BytesIO(path.read_bytes())  # which the system cannot map
    np.testing.assert_array_equal(read_tensor(memory, tensors["F64"]), arrays()["F64"])


def test_empty_file_of_tensors(tmp_path: Path) -> None:
    write(tmp_path / "none", {}, {}.__getitem__)
    assert read_header(tmp_path / "none") == ({}, {})


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    reference.save_file(arrays(), path, metadata={"format": "pt"})
    same(load(path), arrays())
    assert read_header(path)[1] == {"format": "pt"}


def test_the_reference_reads_what_we_write(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    save(path, arrays())
    same(reference.load_file(path), arrays())


def test_bfloat16_as_torch_has_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors.torch")
    value = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.safetensors"
    reference.save_file({"w": value.bfloat16()}, path)
    np.testing.assert_array_equal(load(path)["w"], value.bfloat16().float().numpy())
    write(path, {"w": ("BF16", (33, 7))}, {"w": value.numpy()}.__getitem__)
    assert torch.equal(reference.load_file(path)["w"], value.bfloat16())


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    cases = {  # bits of the float32: upper half that it rounds to
        0x3F808000: 0x3F80,  # a tie, and the kept half is even
        0x3F818000: 0x3F82,  # a tie, and it is odd
        0x3F808001: 0x3F81,
        0x3F807FFF: 0x3F80,
        0x7F800000: 0x7F80,  # infinity
        0x80000000: 0x8000,  # minus zero
        0x7F7FFFFF: 0x7F80,  # beyond the largest
        0x7FFFFFFF: 0x7FFF,  # a NaN whose carry would make minus zero
        0x7F800001: 0x7FC0,  # a NaN whose cut would make infinity
    }
    value = np.array(list(cases), np.uint32).view(np.float32)
    path = tmp_path / "model.safetensors"
    write(path, {"w": ("BF16", value.shape)}, {"w": value}.__getitem__)
    wide = np.array(list(cases.values()), np.uint32) << 16
    np.testing.assert_array_equal(load(path)["w"].view(np.uint32), wide)
    write(path, {"w": ("BF16", ())}, {"w": np.float32(2)}.__getitem__)
    assert load(path)["w"].shape == ()


def test_float16_is_rounded_but_never_overflows(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"w": ("F16", (1,))}, {"w": np.array([0.1], np.float32)}.__getitem__)
    assert load(path)["w"] == np.float16(0.1)
    with pytest.raises(InputError, match="tensor w has values too large for F16"):
        write(path, {"w": ("F16", (1,))}, {"w": np.array([1e6], np.float32)}.__getitem__)
    assert load(path)["w"] == np.float16(0.1)


def test_integers_never_wrap(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="int64"):
        write(tmp_path / "x", {"w": ("I32", (1,))}, {"w": np.array([2**40])}.__getitem__)
    assert os.listdir(tmp_path) == []


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    asked = []

    def value(name: str) -> np.ndarray:
        asked.append(name)
        return np.full(4, len(asked), np.float32)

    layout = dict.fromkeys("abc", ("F32", (4,)))
    write(tmp_path / "model.safetensors", layout, value)
    assert asked == ["a", "b", "c"]
    assert [v[0] for v in load(tmp_path / "model.safetensors").values()] == [1, 2, 3]


def entry(**changes: object) -> dict[str, object]:
    return {"w": ENTRY | changes}


def spread(*offsets: tuple[int, int]) -> dict[str, object]:
    return {
        f"w{i}": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for i, (start, end) in enumerate(offsets)
    }


HOSTILE = {
    "no JSON": b"{nope}",
    "not an object": [1],
    "leading space": b" {}",
    "empty header": b"",
    "not UTF-8": b'{"\xff": 1}',
    "deep lists": b'{"w":' + b"[" * 100_000,
    "deep objects": b'{"w":' * 100_000,
    "deep shape": json.dumps(entry(shape="?")).replace('"?"', "[" * 900 + "]" * 900).encode(),
    "huge number": b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "duplicate tensor": json.dumps(entry())[:-1].encode() + b"," + json.dumps(entry())[1:].encode(),
    "duplicate field": b'{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
    "metadata not an object": {**entry(), "__metadata__": "x"},
    "metadata not text": {**entry(), "__metadata__": {"step": 1}},
    "metadata null": {**entry(), "__metadata__": None},
    "entry is a list": {"w": [1]},
    "entry is null": {"w": None},
    "missing field": {"w": {"dtype": "F32", "shape": [2]}},
    "unknown field": entry(strides=[1]),
    "unknown dtype": entry(dtype="F8_E4M3"),
    "dtype not text": entry(dtype=["F32"]),
    "dtype null": entry(dtype=None),
    "other dtype": entry(dtype="F64"),
    "shape null": entry(shape=None),
    "shape a number": entry(shape=2),
    "shape of text": entry(shape=["2"]),
    "shape of floats": entry(shape=[2.0]),
    "shape of bools": entry(shape=[True, 2]),
    "negative shape": entry(shape=[-2]),
    "two negatives": entry(shape=[-1, -2]),
    "shape too large": entry(shape=[3]),
    "shape too small": entry(shape=[1]),
    "shape wraps 64 bits": entry(shape=[2**32, 2**32], data_offsets=[0, 0]),
    "empty, yet immense": entry(shape=[0, 2**62], data_offsets=[0, 0]),
    "too many dimensions": entry(shape=[1] * 1000 + [2]),
    "offsets null": entry(data_offsets=None),
    "one offset": entry(data_offsets=[8]),
    "three offsets": entry(data_offsets=[0, 8, 8]),
    "float offsets": entry(data_offsets=[0.0, 8.0]),
    "bool offsets": {"w": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}},
    "infinite offsets": b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
    "negative offsets": entry(data_offsets=[-8, 0]),
    "swapped offsets": entry(data_offsets=[8, 0]),
    "beyond the file": entry(data_offsets=[8, 16]),
    "far beyond the file": entry(data_offsets=[2**63, 2**63 + 8]),
    "overlap": spread((0, 5), (4, 8)),
    "the same bytes twice": spread((0, 8), (0, 8)),
    "a hole": spread((0, 3), (4, 8)),
    "a hole in front": spread((1, 8)),
    "too little data": spread((0, 9)),
    "bytes of no tensor": spread((0, 7)),
    "no tensors but data": {},
    "long name": {"n" * 10**6: 1},
    "name with a line break": {"a\nb": 1},
    "name that is half a character": b'{"\\ud800": 1}',
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_wrong_header_is_refused_on_one_line(header: object, tmp_path: Path) -> None:
    path = put(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    message.encode()


def test_more_tensors_than_any_model_has_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tinygpt.checkpoints.safetensors_file.MAX_TENSORS", 0)
    with pytest.raises(CheckpointError, match="it has 1 tensors: at most 0 are read"):
        read_header(put(tmp_path / "bad", entry()))


@pytest.mark.parametrize("off_by", [-60, -1, 1, 8, 9, 10**8, 2**63, 2**64 - 100])
def test_a_wrong_header_length_is_refused(off_by: int, tmp_path: Path) -> None:
    text = json.dumps(entry()).encode()
    with pytest.raises(CheckpointError):
        read_header(put(tmp_path / "bad", text, length=len(text) + off_by))


def test_a_header_over_the_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "bad", b"{}", length=(8 << 20) + 1)
    os.truncate(path, 9 << 20)  # sparse: takes no disk space
    with pytest.raises(CheckpointError, match="8388609 bytes of header"):
        read_header(path)


def test_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, arrays())
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="fetch it again"):
        read_header(path)


def test_any_damage_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.uint8)})
    whole = path.read_bytes()
    random_ = random.Random(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(damaged))
            kind = random_.randrange(4)
            if kind == 0:
                damaged[at] ^= 1 << random_.randrange(8)
            elif kind == 1:
                damaged[at] = random_.choice(b'0123456789[]{}",:-.eE\\ \0\xff')
            elif kind == 2:
                del damaged[at : at + random_.randint(1, 8)]
            else:
                damaged[at:at] = random_.choice([b"9", b"[", b"}", b"null", damaged[at : at + 9]])
            damaged = damaged or bytearray(b"\0")
        path.write_bytes(damaged)
        try:
            load(path)
        except CheckpointError:
            refused += 1
    assert 1000 < refused < 2000  # flips in the data alone cannot be noticed


NOT_TO_OPEN = r"no such file|is a directory|no plain file|null byte"


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)  # opening it would wait for a writer
    for path in (tmp_path / "missing", tmp_path, fifo, Path("a\0b")):
        with pytest.raises(CheckpointError, match=NOT_TO_OPEN):
            read_header(path)
    with pytest.raises(CheckpointError, match=NOT_TO_OPEN):
        read_tensor(tmp_path / "missing", TensorInfo("F32", (2,), 8, 16))


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"w": np.zeros(100, np.float32)})
    info = read_header(path)[0]["w"]
    os.truncate(path, info.end - 3)
    with pytest.raises(CheckpointError, match="it ends 3 bytes too early"):
        read_tensor(path, info)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    failure: BaseException, raised: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save(path, arrays())
    before = path.read_bytes()

    def value(name: str) -> np.ndarray:
        if name == "b":
            raise failure
        return np.zeros(10, np.float32)

    with pytest.raises(raised) as caught:
        write(path, {"a": ("F32", (10,)), "b": ("F32", (10,))}, value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    if raised is InputError:
        assert str(caught.value) == f"cannot write {path}: no space left on device"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_very_end_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match="input/output error"), atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_atomic_file_replaces_the_file_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
        assert (tmp_path / "real").read_bytes() == b"old"
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_atomic_file_says_why_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    missing, beyond = tmp_path / "no" / "x", tmp_path / "file" / "x"
    for path in (tmp_path, Path("/"), Path("/dev/null"), missing, beyond):
        with pytest.raises(InputError, match=f"cannot write {path}: "), atomic_file(path):
            pass
    assert os.listdir(tmp_path) == ["file"]
