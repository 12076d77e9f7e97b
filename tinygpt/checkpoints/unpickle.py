"""Pickles as torch writes them, read without running anything: tensors come as where they lie.

A pickle is a program for a small machine with a stack. This is that machine with the instructions
that plain data, tensors and the fields of objects need, and no other. The names that a pickle may
call are listed one by one in `pickled_names`, and each is answered by a few lines there, never by
what is really called so. An object of any other class comes as a `Record`: the name of its class,
and its fields as they lie in the pickle. Source: Python's Lib/pickletools.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, NoReturn

from tinygpt.checkpoints.pickled_names import CALLS, RECORDED, STORAGES, Name, Record, Storage
from tinygpt.checkpoints.stored_tensor import MAX_ELEMENTS, MAX_TENSORS
from tinygpt.errors import show
from tinygpt.storage import need

MAX_BYTES = 1 << 20  # GPT-2 XL takes 0.1 MB; nanoGPT's, with its optimizer, four times that


def load(data: bytes) -> Any:
    """What a pickle holds: dicts, lists, tuples, numbers, texts, `TorchTensor`s and `Record`s.

    Objects may hold one another many times over or be nested without end: walk through them no
    deeper than you know them.

    Raises:
        ValueError: for a call of a name that is not in ALLOWED, or anything else that torch does
            not write for tensors; the message says which.
    """
    need(len(data) <= MAX_BYTES, f"its pickle has {len(data)} bytes: at most {MAX_BYTES} are read")
    return load_row(data, 1)[0][0]


def load_row(data: bytes, count: int) -> tuple[list[Any], dict[str, Storage], int]:
    """What pickles hold that stand one after the other.

    Args:
        data: begins with them, and may go on after them.
    Returns:
        what each holds, as from `load`; every storage that they refer to by its key; where the
        last of them ends.
    Raises:
        ValueError: as from `load`.
    """
    machine = _Machine(data)
    try:
        return [machine.run() for _ in range(count)], machine.storages, machine.at
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error


class _Machine:
    """The stack, the memo, and a method for each instruction."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.calls = data, 0, 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """Until the STOP instruction; what is on the stack then."""
        self.memo.clear()
        while (code := self.take(1)) != b".":
            if code not in _INSTRUCTIONS:
                raise ValueError(
                    f"its pickle has the instruction {code!r}, "
                    "which plain data and tensors do not need"
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

    def line(self, encoding: str = "ascii") -> str:
        """The text up to the end of the line."""
        end = self.data.find(b"\n", self.at, self.at + 1000)
        need(end >= 0, "its pickle has a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode(encoding, "backslashreplace")

    def digits(self) -> Any:
        """The number that the line is, in protocol 0."""
        text = self.line()
        if text in ("00", "01"):
            return text == "01"
        if not re.fullmatch(r"-?[0-9]{1,19}L?", text):
            raise ValueError(f"its pickle has {show(text)} as a whole number of 64 bits")
        return int(text.removesuffix("L"))

    def decimal(self) -> float:
        """The number with a fraction that the line is, in protocol 0."""
        text = self.line()
        need(len(text) <= 40, f"its pickle has {show(text)} as a number")
        return float(text)

    def escaped(self) -> str:
        """The text that the line is, in protocol 0; half a character is none in UTF-8 either."""
        text = self.line("raw-unicode-escape")
        half = any("\ud800" <= character <= "\udfff" for character in text)
        need(not half, f"its pickle has the text {show(text)}, which is not UTF-8")
        return text

    def dict_of_marks(self) -> None:
        """DICT: of the keys and values since the mark."""
        flat = self.marks()
        self.push({})
        self.set_items(flat)

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
        """A name, which means nothing yet."""
        if not type(module) is type(name) is str:
            raise ValueError(f"its pickle has the name {show(name)}")
        self.stack.append(Name(f"{module} {name}"))

    def call(self) -> None:
        """REDUCE: what an allowed name makes of its arguments."""
        name, arguments = self.last(2)
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls {show(name)}, which is nothing to call")
        if name.full in RECORDED:
            self.stack.append(Record(name))
            return
        if name.full not in CALLS:
            raise ValueError(f"its pickle calls {show(name)}: only what tensors need is allowed")
        self.calls += 1  # a parameter takes two
        need(self.calls <= 2 * MAX_TENSORS, f"its pickle has more than {MAX_TENSORS} tensors")
        self.stack.append(CALLS[name.full](*arguments))

    def instance(self) -> None:
        """INST, the old form of a call."""
        names, arguments = (self.line(), self.line()), tuple(self.marks())
        self.name(*names)
        self.stack.append(arguments)
        self.call()

    def new_object(self) -> None:
        """NEWOBJ: a record of what would be an object of a class."""
        kind, arguments = self.last(2)
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle makes an object of {show(kind)}, which is no class")
        self.stack.append(Record(kind))

    def persistent(self) -> None:
        """BINPERSID: a storage. Source: torch/serialization.py, `persistent_id`; what torch before
        1.6 wrote has one thing more, None since the views of 0.3 are gone."""
        match self.last(1)[0]:
            case ("storage", Name(full), str(key), str(), int(size), *view) if (
                full in STORAGES and key.isascii() and key.isdigit() and 0 <= size < MAX_ELEMENTS
            ) and view in ([], [None]):
                storage = Storage(STORAGES[full], key, int(size))
                if self.storages.setdefault(key, storage) != storage:
                    raise ValueError(f"its pickle has the storage {show(key)} in two ways")
                self.stack.append(storage)
            case other:
                raise ValueError(f"its pickle refers to {show(other)}, which is no storage")

    def set_items(self, flat: list[Any]) -> None:
        """Keys and values, one after the other, into the dict or record below them."""
        target = self.stack[-1]
        target = target.items if isinstance(target, Record) else target
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
        """BUILD: the fields of a record. An OrderedDict's, torch's `_metadata`, nothing needs."""
        state, target = self.last(1)[0], self.stack[-1]
        if isinstance(target, Record):
            target.state = state  # no copy: a small pickle can name a large dict many times
        elif type(state) is not dict or type(target) is not dict:
            raise ValueError(f"its pickle sets the state of {show(target)}")

    def push(self, value: Any) -> None:
        """A value on the stack."""
        self.stack.append(value)

    def remember(self, number: int) -> None:
        """The topmost element into the memo."""
        self.memo[number] = self.stack[-1]

    def begin(self) -> None:
        """PROTO: the version of the instructions."""
        version = self.number("<B")
        need(version <= 5, f"its pickle is of protocol {version}: at most 5 can be read")

    def long(self) -> int:
        """LONG1, which torch writes for numbers past 32 bits."""
        data = self.take(self.number("<B"))
        need(len(data) <= 8, "its pickle has a number of more than 64 bits")
        return int.from_bytes(data, "little", signed=True)

    def persistent_line(self) -> NoReturn:
        """PERSID, the old form of BINPERSID."""
        raise ValueError(f"its pickle refers to {show(self.line())}, which is no storage")


# The rest of Python's 68 instructions make objects in rarer ways, extend the machine, or are of
# Python 2's texts.
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
    b"C": lambda m: m.push(m.take(m.number("<B"))),  # bytes, as in a number of NumPy's
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
    b"i": _Machine.instance,
    b"\x93": lambda m: m.name(*m.last(2)),
    b"R": _Machine.call,
    b"\x81": _Machine.new_object,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    b"P": _Machine.persistent_line,
    # As protocols 0 and 1 have what is above.
    b"d": _Machine.dict_of_marks,
    b"l": lambda m: m.push(m.marks()),
    b"I": lambda m: m.push(m.digits()),
    b"L": lambda m: m.push(m.digits()),
    b"F": lambda m: m.push(m.decimal()),
    b"V": lambda m: m.push(m.escaped()),
    b"p": lambda m: m.remember(m.digits()),
    b"g": lambda m: m.push(m.memo[m.digits()]),
}
