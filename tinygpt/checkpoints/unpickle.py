"""Pickles as torch writes them, read without running anything: tensors come as where they lie.

A pickle is a program for a small machine with a stack. This is that machine with the instructions
that plain data and tensors need, and no other. The names that a pickle may ask for are listed one
by one below, and each is answered by a few lines here, never by what is really called so. Source:
Python's Lib/pickletools.py, for the instructions; torch/_utils.py, for the names' arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from tinygpt.checkpoints.stored_tensor import MAX_ELEMENTS, MAX_RANK, MAX_TENSORS
from tinygpt.errors import show
from tinygpt.storage import need

MAX_BYTES = 1 << 20  # GPT-2 XL takes 0.1 MB; nanoGPT's, with its optimizer, four times that
_STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class Name:
    """What a pickle calls by its module and name: one of the allowed, and never looked up."""

    full: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers of one type, kept in the archive under its key."""

    dtype: str
    key: str
    size: int  # in elements


@dataclass(frozen=True)
class TorchTensor:
    """A view of a storage; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _ordered_dict(*pairs: Any) -> dict:
    need(not pairs, "it makes an OrderedDict from arguments, which torch does not")
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TorchTensor:
    """Source: torch/_utils.py, `_rebuild_tensor_v2`; the rest is of use in training alone."""
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor's storage is {show(storage)}")
    for numbers in ([offset], shape, strides):
        whole = isinstance(numbers, list | tuple) and len(numbers) <= MAX_RANK
        if not whole or not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in numbers):
            raise ValueError(f"a tensor has {show(numbers)} where whole numbers, 0 or more, belong")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {show(shape)} has strides {show(strides)}")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *rest: Any) -> TorchTensor:
    if not isinstance(tensor, TorchTensor):
        raise ValueError(f"a parameter is {show(tensor)}, not a tensor")
    return tensor


_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
}
ALLOWED = frozenset({*_CALLS, *_STORAGES})  # every name there is; nothing else gets past `_name`


def load(data: bytes) -> Any:
    """What a pickle holds: dicts, lists, tuples, numbers, texts, and `TorchTensor`s.

    Objects may hold one another many times over or be nested without end: walk through them no
    deeper than you know them.

    Raises:
        ValueError: for a name that is not in ALLOWED, or anything else that torch does not write
            for tensors; the message says which.
    """
    need(len(data) <= MAX_BYTES, f"its pickle has {len(data)} bytes: at most {MAX_BYTES} are read")
    try:
        return _Machine(data).run()
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error


class _Machine:
    """The stack, the memo, and a method for each instruction."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.calls = data, 0, 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Until the STOP instruction; what is on the stack then."""
        while (code := self.take(1)) != b".":
            if code not in _INSTRUCTIONS:
                raise ValueError(
                    f"its pickle has the instruction {code!r}, which tensors do not need"
                )
            _INSTRUCTIONS[code](self)
        need(len(self.stack) == 1 and not self.marked, "its pickle ends in the middle")
        return self.stack.pop()

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        self.at += count
        need(self.at <= len(self.data), "its pickle is cut")
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number, as `struct` spells its type."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        """The next text, after its length."""
        data = self.take(self.number(form))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its pickle has the text {show(data)}, which is not UTF-8") from error

    def line(self) -> str:
        """The text up to the end of the line."""
        end = self.data.find(b"\n", self.at, self.at + 1000)
        need(end >= 0, "its pickle has a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode("ascii", "backslashreplace")

    def mark(self) -> None:
        """Begin a stack of its own, for the elements of what comes next."""
        self.marked.append(self.stack)
        self.stack = []

    def marks(self) -> list[Any]:
        """What is on the stack since the last mark, and back to the stack below it."""
        found, self.stack = self.stack, self.marked.pop()
        return found

    def last(self, count: int) -> list[Any]:
        """The topmost elements, taken off the stack."""
        need(len(self.stack) >= count, "its pickle takes more from the stack than there is")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def name(self, module: Any, name: Any) -> None:
        """A name, if it is one of the allowed."""
        if not type(module) is type(name) is str:
            raise ValueError(f"its pickle has the name {show(name)}")
        full = f"{module} {name}"
        if full not in ALLOWED:
            asked = show(f"{module}.{name}")
            raise ValueError(f"its pickle asks for {asked}: only what tensors need is allowed")
        self.stack.append(Name(full))

    def call(self) -> None:
        """REDUCE: what an allowed name makes of its arguments."""
        name, arguments = self.last(2)
        known = isinstance(name, Name) and name.full in _CALLS
        if not known or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls {show(name)}, which is nothing to call")
        self.calls += 1  # a parameter takes two
        need(self.calls <= 2 * MAX_TENSORS, f"its pickle has more than {MAX_TENSORS} tensors")
        self.stack.append(_CALLS[name.full](*arguments))

    def persistent(self) -> None:
        """BINPERSID: a storage. Source: torch/serialization.py, `persistent_id`."""
        match self.last(1)[0]:
            case ("storage", Name(full), str(key), str(), int(size)) if (
                full in _STORAGES and key.isascii() and key.isdigit() and 0 <= size < MAX_ELEMENTS
            ):
                self.stack.append(Storage(_STORAGES[full], key, int(size)))
            case other:
                raise ValueError(f"its pickle refers to {show(other)}, which is no storage")

    def set_items(self, flat: list[Any]) -> None:
        """Keys and values, one after the other, into the dict below them."""
        target = self.stack[-1]
        need(type(target) is dict and len(flat) % 2 == 0, "its pickle sets items of no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Other keys, such as tuples of tuples, could take for ever to hash.
            if type(key) not in (str, int):
                raise ValueError(f"its pickle has the key {show(key)}, no text or number")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        """Values to the end of the list below them."""
        need(type(self.stack[-1]) is list, "its pickle appends to no list")
        self.stack[-1].extend(values)

    def build(self) -> None:
        """BUILD: the attributes of an OrderedDict, torch's `_metadata`, which nothing needs."""
        state = self.last(1)[0]
        if type(state) is not dict or type(self.stack[-1]) is not dict:
            raise ValueError(f"its pickle sets the state of {show(self.stack[-1])}")

    def push(self, value: Any) -> None:
        """A value on the stack."""
        self.stack.append(value)

    def remember(self, number: int) -> None:
        """The topmost element into the memo."""
        self.memo[number] = self.stack[-1]

    def begin(self) -> None:
        """PROTO: the version of the instructions."""
        version = self.number("<B")
        need(version <= 4, f"its pickle is of protocol {version}: at most 4 can be read")

    def long(self) -> int:
        """LONG1, which torch writes for numbers past 32 bits."""
        data = self.take(self.number("<B"))
        need(len(data) <= 8, "its pickle has a number of more than 64 bits")
        return int.from_bytes(data, "little", signed=True)

    def persistent_line(self) -> NoReturn:
        """PERSID, the old form of BINPERSID."""
        raise ValueError(f"its pickle refers to {show(self.line())}, which is no storage")


# The rest of Python's 68 instructions make objects, extend the machine, or came before protocol 2.
_INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine.begin,
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": _Machine.mark,
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(m.long()),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.text("<I")),
    b"\x8c": lambda m: m.push(m.text("<B")),
    b"t": lambda m: m.push(tuple(m.marks())),
    b"\x85": lambda m: m.push(tuple(m.last(1))),
    b"\x86": lambda m: m.push(tuple(m.last(2))),
    b"\x87": lambda m: m.push(tuple(m.last(3))),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"s": lambda m: m.set_items(m.last(2)),
    b"u": lambda m: m.set_items(m.marks()),
    b"a": lambda m: m.append(m.last(1)),
    b"e": lambda m: m.append(m.marks()),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"i": lambda m: m.name(m.line(), m.line()),  # INST, which goes on to call it: no such call
    b"\x93": lambda m: m.name(*m.last(2)),
    b"R": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    b"P": _Machine.persistent_line,
}
