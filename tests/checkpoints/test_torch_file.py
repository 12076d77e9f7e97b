"""The archives that torch writes, and what else a zip archive can be made to say."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tinygpt import GPT
from tinygpt.checkpoints import torch_file
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.errors import CheckpointError

FLOATS = np.arange(6, dtype=np.float32)


def tensor(shape: tuple, strides: tuple, offset: int = 0, size: int = 6, key: str = "0") -> bytes:
    """The pickle of {"w": tensor}, by hand: protocol 2 as torch writes it."""

    def plain(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key) + plain("cpu")
    storage += plain(size) + b"tQ"
    arguments = b"(" + storage + plain(offset) + plain(shape) + plain(strides) + b"\x89}t"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}" + plain("w") + call + b"s."


GOOD = tensor((2, 3), (3, 1))


def archive(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def usual(pickled: bytes = GOOD, **more: bytes) -> list[tuple[str, bytes]]:
    return [("x/data.pkl", pickled), ("x/data/0", FLOATS.tobytes()), *more.items()]


def refuses(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        torch_file.read_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "want"),
    [
        ((2, 3), (3, 1), 0, FLOATS.reshape(2, 3)),
        ((3, 2), (1, 3), 0, FLOATS.reshape(2, 3).T),
        ((2,), (2,), 1, FLOATS[1:4:2]),
        ((), (), 5, FLOATS[5]),
        ((0, 9), (9, 1), 6, np.zeros((0, 9))),
    ],
)
def test_a_view_is_read_as_its_strides_say(tmp_path, shape, strides, offset, want):
    (tmp_path / "x.pt").write_bytes(archive(usual(tensor(shape, strides, offset))))
    tensors, rest = torch_file.read_header(tmp_path / "x.pt")
    assert rest == {}
    np.testing.assert_array_equal(read_tensor(tmp_path / "x.pt", tensors["w"]), want)


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (tensor((2, 3), (3, 1), offset=1), "reaches past its storage of 6"),
        (tensor((2, 3), (4, 1)), "reaches past its storage of 6"),
        (tensor((7,), (1,)), "reaches past its storage of 6"),
        (tensor((2**40,), (0,)), "with strides"),
        (tensor((2**40, 2**40), (0, 0)), "is too large"),
        (tensor((2,), (2**47,)), "reaches past its storage"),
        (tensor((2, 3), (-3, 1)), r"has \(-3, 1\) where whole numbers"),
        (tensor((2, 3), (3, 1), offset=-1), r"has \[-1\] where whole numbers"),
        (tensor((2, 3.0), (3, 1)), "where whole numbers"),
        (tensor((2, True), (3, 1)), "where whole numbers"),
        (tensor((2**62,), (1,)), "where whole numbers"),
        (tensor((1,) * 33, (1,) * 33), "where whole numbers"),
        (tensor((2, 3), (1,)), r"of shape \(2, 3\) has strides \(1,\)"),
        (tensor((2, 3), (3, 1), size=7), "7 of F32 are not 24 bytes"),
        (tensor((2, 3), (3, 1), size=2**47), "of F32 are not 24 bytes"),
        (tensor((2, 3), (3, 1), key="1"), "no storage '1'"),
        (b"\x80\x02]N.", "ends in the middle"),
        (b"\x80\x02].", r"it holds \[\], not a state dict"),
        (b"\x80\x02}X\x01\0\0\0aK\x01s.", "'a' is 1, not a tensor"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_in_its_storage_is_refused(tmp_path, pickled, words):
    refuses(tmp_path / "x.pt", archive(usual(pickled)), words)


LONG = "x/" + "a" * 60_000
ODD_NAMES = ["../x", "/x", "x//y", "x\\y", "C:x", "x/./y", "x/../../y", "x/\ny", "\u202ex", "x/"]


def test_a_file_may_be_called_as_it_likes(tmp_path):
    for name in ("run 12:30.pth", "tab\tname.pt"):  # torch calls the folder in it so
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.from_numpy(FLOATS)}, tmp_path / name)
        found = torch_file.read_header(tmp_path / name)[0]["w"]
        np.testing.assert_array_equal(read_tensor(tmp_path / name, found), FLOATS)


def test_more_tensors_than_any_model_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_TENSORS", 0)
    refuses(tmp_path / "x.pt", archive(usual()), "it holds 1 tensors: at most 0 are read")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_entry_leaves_the_archive_by_its_name(tmp_path, name):
    refuses(tmp_path / "x.pt", archive([*usual(), (name, b"")]), "is no plain name in a folder")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_compressed_archive_is_refused_before_it_is_read(tmp_path):
    """A kilobyte can be a gigabyte; torch never compresses."""
    bomb = [*usual(), ("x/data/1", bytes(10**7))]
    data = archive(bomb, zipfile.ZIP_DEFLATED)
    assert len(data) < 50_000
    refuses(tmp_path / "x.pt", data, "is compressed or encrypted")


def test_an_entry_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive([*usual(), ("x/data/0", b"")])
    refuses(tmp_path / "x.pt", data, "'x/data/0' is there twice")


def test_entries_over_one_another_are_refused(tmp_path):
    """As in Fifield 2019, "A better zip bomb": many names for the same bytes."""
    data = bytearray(archive([*usual(), ("x/data/1", FLOATS.tobytes())]))
    first, second = data.index(b"x/data/0") - 30, data.index(b"x/data/1") - 30
    listed = data.rindex(b"x/data/1") - 46
    data[listed + 42 : listed + 46] = struct.pack("<I", first)
    refuses(tmp_path / "x.pt", bytes(data), "differs from the list of contents")
    data[second + 30 : second + 38] = b"x/data/9"
    data[first + 30 : first + 38] = b"x/data/1"
    refuses(tmp_path / "x.pt", bytes(data), "'x/data/0' differs from the list of contents")
    grown = bytearray(archive([*usual(), ("x/data/1", FLOATS.tobytes())]))
    listed = grown.rindex(b"x/data/0") - 46
    grown[listed + 20 : listed + 28] = struct.pack("<II", 100, 100)
    refuses(tmp_path / "x.pt", bytes(grown), "'x/data/1' overlaps another")


def test_a_long_list_of_contents_is_not_read(tmp_path):
    entries = [(f"{LONG}{i}", b"") for i in range(80)]
    refuses(tmp_path / "x.pt", archive([*usual(), *entries]), "list of contents is too long")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("x/data/0", b"")], "one folder with one data.pkl"),
        ([*usual(), ("y/data.pkl", b"")], "one folder with one data.pkl"),
        ([("data.pkl", GOOD)], "one folder with one data.pkl"),
        (usual(**{"x/byteorder": b"big"}), "its byte order is not little"),
        (usual(**{"x/byteorder": b"x" * (2 << 20)}), "has more than 1 MiB"),
    ],
)
def test_what_torch_does_not_write_is_refused(tmp_path, entries, words):
    refuses(tmp_path / "x.pt", archive(entries), words)


def test_a_changed_pickle_is_noticed(tmp_path):
    data = archive(usual()).replace(b"FloatStorage", b"LongxStorage")
    refuses(tmp_path / "x.pt", data, "'x/data.pkl' is damaged: fetch it again")


def test_cut_anywhere_is_refused(tmp_path):
    data = archive(usual())
    for size in range(0, len(data), 3):
        (tmp_path / "x.pt").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            torch_file.read_header(tmp_path / "x.pt")


def test_tensors_that_share_a_storage_do_not_multiply_it(tmp_path):
    """A thousand layers that are all the same bytes would make a small file a large model."""
    torch = pytest.importorskip("torch")
    from writers import nanogpt_model

    model, layers = nanogpt_model(bias=False), 50
    state = model.state_dict()
    blocks = {n: v for n, v in state.items() if n.startswith("transformer.h.0.")}
    for i in range(layers):
        state |= {n.replace(".h.0.", f".h.{i}."): v for n, v in blocks.items()}
    args = {"n_layer": layers, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 300}
    torch.save({"model": state, "model_args": {**args, "bias": False}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"its tensors are \d+ bytes in files of"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


# What torch wrote before 1.6: a row of pickles, and the storages after them.

MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def old_file(
    pickled: bytes = GOOD,
    version: object = 1001,
    machine: object = MACHINE,
    keys: object = ("0",),
    storages: bytes = struct.pack("<Q", 6) + FLOATS.tobytes(),
) -> bytes:
    keys = list(keys) if isinstance(keys, tuple) else keys
    rows = [pickle.dumps(version, 2), pickle.dumps(machine, 2), pickled, pickle.dumps(keys, 2)]
    return torch_file.OLD_START + b"".join(rows) + storages


OTHER = struct.pack("<Q", 7) + FLOATS.tobytes() + bytes(4)
OLD_FAULTS = {
    "version": (old_file(version=1002), "it is of torch's version 1002, not 1001"),
    "version of an odd type": (old_file(version=[[]]), r"version \[\[\]\], not 1001"),
    "byte order": (old_file(machine={"little_endian": False}), "its byte order is not little"),
    "no machine": (old_file(machine=[]), "its byte order is not little"),
    "no keys": (old_file(keys=(), storages=b""), "its list of storages is not theirs"),
    "a key too many": (old_file(keys=("0", "1")), "its list of storages is not theirs"),
    "a key twice": (old_file(keys=("0", "0")), "its list of storages is not theirs"),
    "another key": (old_file(keys=("1",)), "its list of storages is not theirs"),
    "keys of no type": (old_file(keys=((),)), "its list of storages is not theirs"),
    "keys that are no list": (old_file(keys={"0": 1}), "its list of storages is not theirs"),
    "another size": (old_file(storages=OTHER), "its storage '0' has 7 elements, not 6"),
    "cut": (old_file()[:-1], "the file is cut"),
    "cut before the numbers": (old_file()[:-24], "the file is cut"),
    "bytes too many": (old_file() + b"x", "its tensors end at byte"),
    "a pickle that is cut": (torch_file.OLD_START + pickle.dumps(1001, 2), "its pickle is cut"),
    "past its storage": (
        old_file(tensor((2, 3), (3, 1), offset=1)), "reaches past its storage of 6"
    ),
    "larger than the file": (
        old_file(tensor((2, 3), (3, 1), size=2**47), storages=struct.pack("<Q", 2**47)),
        "the file is cut",
    ),
    "a view of torch 0.3": (
        old_file(GOOD.replace(b"K\x06tQ", b"K\x06X\x01\0\0\0vtQ")), "which is no storage"
    ),
}  # fmt: skip


@pytest.mark.parametrize("pickled", [GOOD, GOOD.replace(b"K\x06tQ", b"K\x06NtQ")])
def test_a_file_by_torch_before_1_6_is_read(tmp_path, pickled):
    (tmp_path / "x.bin").write_bytes(old_file(pickled))
    tensors, rest = torch_file.read_header(tmp_path / "x.bin")
    assert rest == {}
    found = read_tensor(tmp_path / "x.bin", tensors["w"])
    np.testing.assert_array_equal(found, FLOATS.reshape(2, 3))


@pytest.mark.parametrize("fault", OLD_FAULTS)
def test_a_damaged_file_by_torch_before_1_6_is_refused(fault, tmp_path):
    refuses(tmp_path / "x.bin", *OLD_FAULTS[fault])


def test_a_file_by_torch_before_1_6_cut_anywhere_is_refused(tmp_path):
    data = old_file()
    for size in range(len(data)):
        (tmp_path / "x.bin").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            torch_file.read_header(tmp_path / "x.bin")


def test_an_optimizers_state_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.optim.AdamW([torch.zeros(2, requires_grad=True)]).state_dict()
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="the state of an optimizer: give the file with the"):
        GPT.from_pretrained(tmp_path / "x.pt")


def test_a_whole_pickled_model_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    words = r"it holds an object of <torch.nn.modules.linear.Linear>, .*give a state dict"
    with pytest.raises(CheckpointError, match=words):
        GPT.from_pretrained(tmp_path / "x.pt")
