"""Pickles that would run code, fill the memory or never end: refused by name, nothing executed."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygpt
from tinygpt import GPT
from tinygpt.checkpoints import torch_file
from tinygpt.checkpoints.pickled_names import ALLOWED, Record
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.checkpoints.unpickle import MAX_BYTES, load
from tinygpt.errors import CheckpointError

DICT = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def put_old(path: Path, data: bytes) -> Path:
    """The same as torch before 1.6 wrote it."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    rows = [pickle.dumps(1001, 2), pickle.dumps(machine, 2), data, pickle.dumps([], 2)]
    path.write_bytes(torch_file.OLD_START + b"".join(rows))
    return path


def put(path: Path, data: bytes, **others: bytes) -> Path:
    """A torch file around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in {"data/0": bytes(24), "byteorder": b"little", **others}.items():
            archive.writestr(f"archive/{name}", content)
    return path


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class Sets:
    """Pickles as a call whose result is given a state, which BUILD hands to `__setstate__`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return collections.OrderedDict, (), {"x": Calls(os.system, "echo > hacked")}


class Plain:
    """An object that pickles as its class and its fields."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __setstate__(self, state: dict) -> None:
        raise AssertionError("it was made")


class Slotted:
    """One whose fields are not in a dict."""

    __slots__ = ("n_layer",)

    def __init__(self) -> None:
        self.n_layer = 2


class Listed(dict):
    """A dict of a class of its own."""


def by_hand(module: str, name: str, argument: str = "echo > hacked") -> bytes:
    """A call in protocol 2, of what need not be there to be named."""
    text = struct.pack("<I", len(argument)) + argument.encode()
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"X" + text + b"\x85R."


# Kind -> (pickle, the name in the message).
CODE = "__import__('pathlib').Path('hacked').touch()"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps(Calls(os.system, "echo > hacked"), 2), "posix.system"),
    "os.system, protocol 0": (b"cos\nsystem\n(S'echo > hacked'\ntR.", "instruction b'S'"),
    "os.system by itself": (b"cos\nsystem\n.", "it holds <os.system>"),
    "os.system as a class": (
        b"\x80\x02cos\nsystem\nX\x0d\0\0\0echo > hacked\x85\x81.", "an object of <os.system>"
    ),
    "os.system as a class, with a state": (
        b"\x80\x02cos\nsystem\n)\x81X\x0d\0\0\0echo > hackedb.", "an object of <os.system>"
    ),
    "an object of no class": (b"\x80\x02K\x01)\x81.", "an object of 1, which is no class"),
    "an object of an object": (b"\x80\x02ca\nb\n)\x81)\x81.", "which is no class"),
    "a call of an object": (b"\x80\x02ca\nb\n)\x81)R.", "nothing to call"),
    "an object as a tensor's storage": (
        b"\x80\x02" + REBUILD + b"(ca\nb\n)\x81K\0))tR.", "a tensor's storage is an object of"
    ),
    "a parameter of no tensor": (
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x05\x85R.", "a parameter is 5, not a tensor"
    ),
    "a name that is no text": (b"\x80\x04K\1\x8c\1x\x93.", "has the name 'x'"),
    "an object as the model": (
        pickle.dumps({"model": Plain()}, 2), "its model is an object of .*Plain"
    ),
    "an object as a tensor": (pickle.dumps({"w": Plain()}, 2), "'w' is an object of .*Plain"),
    "a whole model": (pickle.dumps(Plain(), 4), "it holds an object of .*Plain.*give a state dict"),
    "a storage in two ways": (
        b"\x80\x02](" + b"".join(
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK%ctQ" % n
            for n in (6, 7)
        ) + b"e.", "the storage '0' in two ways"
    ),
    "os.system, protocol 4": (pickle.dumps(Calls(os.system, "echo > hacked"), 4), "posix.system"),
    "os.system as INST": (b"(S'echo > hacked'\nios\nsystem\n.", "instruction b'S'"),
    "os.system as INST, newer texts": (b"(X\x01\0\0\0aios\nsystem\n.", "os.system"),
    "subprocess": (pickle.dumps(Calls(subprocess.Popen, ["mkdir", "hacked"]), 2), "Popen"),
    "builtins.eval": (pickle.dumps(Calls(builtins.eval, CODE), 2), "__builtin__.eval"),
    "builtins.exec": (pickle.dumps(Calls(builtins.exec, CODE), 4), "builtins.exec"),
    "builtins.getattr": (by_hand("builtins", "getattr"), "builtins.getattr"),
    "builtins.__import__": (by_hand("builtins", "__import__", "os"), "builtins.__import__"),
    "a dotted name": (by_hand("collections", "OrderedDict.fromkeys"), "OrderedDict.fromkeys"),
    "a dotted module": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"),
    "numpy, runstring": (by_hand("numpy.testing._private.utils", "runstring"), "runstring"),
    "numpy, load with pickles": (by_hand("numpy", "load", "hacked.npy"), "numpy.load"),
    "numpy, an object array": (pickle.dumps(np.array([{}], object), 2), "_reconstruct"),
    "torch, load": (by_hand("torch", "load", "hacked.pt"), "torch.load"),
    "torch, hub": (by_hand("torch.hub", "load", "x/y"), "torch.hub.load"),
    "torch, extension": (by_hand("torch.utils.cpp_extension", "load"), "cpp_extension.load"),
    "torch, a library": (by_hand("torch.ops", "load_library", "x.so"), "load_library"),
    "torch, a storage from a file": (
        by_hand("torch.FloatStorage", "from_file"), "torch.FloatStorage.from_file"
    ),
    "codecs": (by_hand("_codecs", "encode"), "_codecs.encode"),
    "a partial": (by_hand("functools", "partial"), "functools.partial"),
    "nested reduce": (
        b"\x80\x02" + DICT + by_hand("os", "system")[2:-1] + b"\x85R.", "os.system"
    ),
    "reduce of a reduce": (b"\x80\x02" + DICT + b")R)R.", "nothing to call"),
    "a storage called": (
        b"\x80\x02ctorch\nFloatStorage\nK\x05\x85R.", "calls <torch.FloatStorage>"
    ),
    "a call in a state": (pickle.dumps(Sets(), 2), "posix.system"),
    "a state for a tensor": (b"\x80\x02" + DICT + b"}b.", "sets the state of"),
    "NEWOBJ": (b"\x80\x02" + DICT + b")\x81.", "an object of <collections.OrderedDict>"),
    "NEWOBJ_EX": (b"\x80\x04" + DICT + b")}\x92.", r"instruction b'\\x92'"),
    "OBJ": (b"(" + DICT + b"o.", "instruction b'o'"),
    "an extension": (b"\x80\x02\x82\x01.", r"instruction b'\\x82'"),
    "a buffer": (b"\x80\x05\x97.", r"instruction b'\\x97'"),
    "a protocol to come": (b"\x80\x06N.", "protocol 6"),
    "a persistent id as a line": (b"Pcos.system\n.", "which is no storage"),
    "a persistent id of text": (b"\x80\x02X\x04\0\0\0evilQ.", "refers to 'evil'"),
    "a persistent path": (
        b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x0b\0\0\0../../etc/xX\x03\0\0\0cpuK\x06tQ.",
        "which is no storage",
    ),
    "a persistent id with a call": (
        b"\x80\x02(X\x07\0\0\0storagecos\nsystem\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ.", "os.system"
    ),
    "a memo that is not there": (b"\x80\x02j\xff\xff\xff\xff.", "KeyError"),
    "a key that takes for ever to hash": (
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.", "no text or number"
    ),
    "a number without end": (b"\x80\x02\x8b\xff\xff\xff\x7f", r"instruction b'\\x8b'"),
    "a number that is none": (b"I1_0\n.", "has '1_0' as a whole number"),
    "a number of many digits": (b"L" + b"9" * 900 + b"L\n.", "as a whole number of 64 bits"),
    "a float that is none": (b"Fx\n.", "could not convert"),
    "a float of many digits": (b"F" + b"x" * 900 + b"\n.", "as a number"),
    "half a character": (b"V\\ud800\n.", "which is not UTF-8"),
    "a text that is cut in a character": (b"V\\u00\n.", "it holds|decode"),
    "a dict of halves": (b"(Va\nd.", "sets items of no dict"),
    "a dict with keys that take for ever to hash": (b"(()Nd.", "no text or number"),
    "a line of the memo that is not there": (b"g7\n.", "KeyError"),
    "nothing to remember": (b"p0\n.", "IndexError"),
    "a text without end": (b"\x80\x02X\xff\xff\xff\xff", "is cut"),
    "an empty stack": (b"\x80\x02R.", "takes more from the stack"),
    "nothing": (b"", "is cut"),
}  # fmt: skip


@pytest.mark.parametrize("put", [put, put_old])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(kind, put, tmp_path, monkeypatch):
    data, name = HOSTILE[kind]
    path = put(tmp_path / "model.pth", data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):  # once before, for what any refusal imports
        GPT.from_pretrained(path)
    imported = set(sys.modules)
    with pytest.raises(CheckpointError, match=name) as caught:
        GPT.from_pretrained(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    assert set(sys.modules) == imported


def test_the_same_pickles_run_where_anything_is_allowed(tmp_path, monkeypatch):
    """So that the test above could fail."""
    monkeypatch.chdir(tmp_path)
    for kind in ("os.system", "os.system, protocol 4", "builtins.exec", "a call in a state"):
        pickle.loads(HOSTILE[kind][0])
        (tmp_path / "hacked").unlink()


def bomb(kind: str) -> bytes:
    """A small pickle of an object that would be immense, were each part of it a copy."""
    if kind == "tuples of twice the same":
        return b"\x80\x02]q\0" + b"h\0h\0\x86q\0" * 60 + b"."
    if kind == "lists of twice the same":
        return b"\x80\x02]q\0" + b"](h\0h\0eq\0" * 60 + b"."
    if kind == "a list in itself":
        return b"\x80\x02]q\0h\0a."
    if kind == "lists in lists":
        return b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    if kind == "marks":
        return b"\x80\x02" + b"(" * 50_000
    if kind == "objects of twice the same":
        twice = b"ca\nb\n)\x81h\0h\0\x86bq\0"
        return b"\x80\x02ca\nb\n)\x81q\0" + twice * 60 + b"."
    if kind == "a large state for many objects":
        items = b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(1 << 16))
        return b"\x80\x02}(" + items + b"uq\0](" + b"ca\nb\n)\x81h\0b" * 70_000 + b"e."
    assert kind == "a memo of far numbers"
    places = b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(20_000))
    return b"\x80\x02]" + places + b"."


@pytest.mark.parametrize(
    "kind",
    [
        "tuples of twice the same", "lists of twice the same", "a list in itself", "lists in lists",
        "marks", "a memo of far numbers", "objects of twice the same",
        "a large state for many objects",
    ],
)  # fmt: skip
def test_a_bomb_takes_little_memory(kind, tmp_path):
    path = put(tmp_path / "model.pth", bomb(kind))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            torch_file.read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < len(str(path)) + 500


def test_a_long_pickle_is_refused_before_it_is_read(tmp_path):
    path = put(tmp_path / "model.pth", b"N" * (MAX_BYTES + 1))
    with pytest.raises(CheckpointError, match=r"'archive/data.pkl' has more than 1 MiB"):
        torch_file.read_header(path)


def test_the_allowed_names_are_these():
    kinds = "Double Float Half BFloat16 Long Int Short Char Byte Bool"
    recorded = {
        "torch device", "torch Size", "pathlib PosixPath", "pathlib WindowsPath", "numpy dtype",
        "__builtin__ set", "builtins set", "numpy.core.multiarray scalar",
        "numpy._core.multiarray scalar", "_codecs encode",
    }  # fmt: skip
    assert (
        recorded
        | {
            "collections OrderedDict",
            "torch._utils _rebuild_tensor_v2",
            "torch._utils _rebuild_parameter",
            *(f"torch {kind}Storage" for kind in kinds.split()),
        }
        == ALLOWED
    )


def test_no_unpickler_but_ours_is_in_the_package():
    ours = {"disk_cache.py", "step_store.py"}  # of the user's own cache, as tinygrad's is
    for path in Path(tinygpt.__file__).parent.rglob("*.py"):
        if path.name in ours:
            continue
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "pickle.load" not in text.replace("unpickle.load", "")
        assert "torch_load" not in text


PLAIN = [
    None, True, False, 0, 255, 256, 65536, -1, 2**31, -(2**62), 1.5, float("inf"), "", "ü" * 99,
    (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, 2], {}, {"a": 1}, {1: [(), {}]},
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [*PLAIN, PLAIN], ids=lambda value: str(value)[:20])
def test_plain_data_comes_as_pickle_reads_it(value, protocol):
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_object_of_an_unknown_class_comes_as_its_fields_and_is_never_made(protocol):
    with_all = Plain(n_layer=2, name="x", inner=Plain(a=[1]), here=Path("x"), rate=np.float64(0.5))
    found = load(pickle.dumps([with_all, Slotted(), Listed(n_layer=3)], protocol))
    assert [type(each) for each in found] == [Record] * 3
    assert [each.fields.get("n_layer") for each in found] == [2, 2, 3]
    fields = found[0].fields
    assert fields["name"] == "x"
    assert fields["inner"].fields == {"a": [1]}
    assert str(fields["here"]) == "an object of <pathlib.PosixPath>"
    assert str(fields["rate"]).endswith("multiarray.scalar>")
    with pytest.raises(AssertionError, match="it was made"):  # so that this test could fail
        pickle.loads(pickle.dumps(with_all, protocol))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_what_torch_writes_needs_nothing_more(new, tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tensors = model.state_dict()  # an OrderedDict with a state of its own
    tensors |= {
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "turned": torch.randn(3, 4).T,
        "part": torch.randn(6, 5)[1:4, 2:4],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        **{
            name: torch.tensor([0, 1, 3]).to(getattr(torch, name))
            for name in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8")
        },
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }
    saved = {"model": tensors, "step": 3}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found, rest = torch_file.read_header(tmp_path / "x.pt")
    assert rest == {"step": 3}
    assert found.keys() == tensors.keys()
    for name, info in found.items():
        want = tensors[name].detach()
        array = read_tensor(tmp_path / "x.pt", info)
        np.testing.assert_array_equal(array, want.float() if want.dtype.is_floating_point else want)
    if not new:
        return
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        used = {code.name for code, _, _ in pickletools.genops(archive.read("x/data.pkl"))}
    assert {"BINPERSID", "REDUCE", "BUILD"} <= used
