"""What the names in a pickle stand for: each that means anything, and what it gives here.

Source: torch/_utils.py, for the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tinygpt.checkpoints.stored_tensor import MAX_ELEMENTS, MAX_RANK
from tinygpt.errors import show
from tinygpt.storage import need

STORAGES = {
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
    """What a pickle calls by its module and name, which is never looked up."""

    full: str

    def __repr__(self) -> str:
        return f"<{self.full.replace(' ', '.')}>"


@dataclass(eq=False)
class Record:
    """An object of a class that is not looked up: what the pickle says of it, and nothing else."""

    kind: Name
    items: dict[str | int, Any] = field(default_factory=dict)  # where the class is a kind of dict
    state: Any = None  # what its own class would understand

    @property
    def fields(self) -> dict[str | int, Any]:
        """Its fields by their names."""
        # What a class with `__slots__` has stands in a second dict.
        parts = self.state if type(self.state) is tuple else (self.state,)
        found = dict(self.items)
        for part in parts[:2]:
            found |= part if type(part) is dict else {}
        return found

    def __repr__(self) -> str:  # the fields may hold one another without end
        return f"an object of {self.kind}"


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


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
}
# What settings beside a model are often made with. The call becomes a record, as an object does.
RECORDED = (
    "torch device", "torch Size", "pathlib PosixPath", "pathlib WindowsPath", "__builtin__ set",
    "builtins set", "numpy dtype", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar",
    "_codecs encode",
)  # fmt: skip
# Every name that does anything. A class of any other name makes a record, and no other call is.
ALLOWED = frozenset({*CALLS, *STORAGES, *RECORDED})
