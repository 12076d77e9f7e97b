"""How a setting is declared, once for Python, the command line and files alike.

A setting is a field of a dataclass. Its type says what kind of value it takes, and its metadata
says what it means, what values it may have, and what else its flag is called. From the one
declaration come the check (`Checked`), the flag and its help (`commands.flags`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tinygpt.errors import check_bool, check_float, check_int, unknown


@dataclass(frozen=True)
class Kind:
    """What a setting's type says: `Literal["a", "b"] | None` is an optional str of two choices."""

    type: type
    optional: bool = False
    choices: tuple[str, ...] = ()


def option(
    default: Any,
    help: str,
    *,
    short: tuple[str, ...] = (),
    off: tuple[str, ...] = (),
    flag: bool = True,
    limits: Mapping[str, float] | None = None,
    **more: Any,
) -> Any:
    """A field of a dataclass that is a setting.

    Args:
        default: its value where none is given.
        help: what it means, in a few words.
        short: other spellings of its flag, which is `--n-layer` for the field n_layer.
        off: other spellings of the flag that turns it off, which is `--no-bias` for bias.
        flag: whether commands have a flag for it at all.
        limits: those of a number: arguments of `errors.check_int` or `errors.check_float`.
        more: what else the dataclass wants to know of its field.
    """
    known = {"help": help, "short": short, "off": off, "flag": flag, "limits": limits or {}}
    return field(default=default, metadata={**known, **more})


def option_of(other: type, name: str, default: Any, help: str | None = None) -> Any:
    """A field declared as that of another dataclass is, with a default and perhaps words of its
    own."""
    known = {each.name: each.metadata for each in fields(other)}[name]
    return field(default=default, metadata={**known, "help": help or known["help"]})


def kinds(owner: type) -> dict[str, Kind]:
    """The kind of each field of a dataclass, by its name."""
    hashed: Any = owner  # which mypy denies of a class whose objects are compared
    return _kinds(hashed)


@cache
def _kinds(owner: type) -> dict[str, Kind]:
    hints = get_type_hints(owner)
    return {each.name: _kind(hints[each.name]) for each in fields(owner)}


def _kind(hint: Any) -> Kind:
    if get_origin(hint) is Literal:
        return Kind(str, choices=get_args(hint))
    if NoneType in get_args(hint):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return Kind(_kind(inner).type, True, _kind(inner).choices)
    return Kind(hint)


def check_value(name: str, value: Any, kind: Kind, limits: Mapping[str, Any]) -> None:
    """Refuse a value that is not of its kind or not within its limits.

    Args:
        name: what the user calls it.
    Raises:
        InputError: with the name, the value, and what is allowed.
    """
    if value is None and kind.optional:
        return
    if kind.choices:
        if value not in kind.choices:
            raise unknown(name, value, kind.choices)
    elif kind.type is bool:
        check_bool(name, value)
    elif kind.type is int:
        check_int(name, value, **limits)
    elif kind.type is float:
        check_float(name, value, **limits)


def check_options(
    owner: type, values: Mapping[str, Any], spelled: Callable[[str], str] = str
) -> None:
    """Check a value for each field of a dataclass, as its declaration there says.

    Args:
        values: by the fields' names.
        spelled: a field's name -> what the user calls it: the flag, if it was given as one.
    Raises:
        InputError: for the first value that cannot work.
    """
    known = kinds(owner)
    for each in fields(owner):
        name, limits = each.name, each.metadata["limits"]
        check_value(spelled(name), values[name], known[name], limits)


def check_names(owner: type, names: Iterable[str], what: str) -> None:
    """Refuse a name that no field of a dataclass has.

    Args:
        what: what an error calls such a name.
    Raises:
        InputError: for the first one, with the nearest that there is.
    """
    known = [each.name for each in fields(owner)]
    for name in names:
        if name not in known:
            raise unknown(what, name, known)


class Checked:
    """What a frozen dataclass of settings inherits to be checked when it is made."""

    def __post_init__(self) -> None:
        self.check(vars(self))
        for name, kind in kinds(type(self)).items():  # a file may have 0 for 0.0
            if kind.type is float and isinstance(value := getattr(self, name), int):
                object.__setattr__(self, name, float(value))

    @classmethod
    def check(cls, values: Mapping[str, Any], spelled: Callable[[str], str] = str) -> None:
        """Refuse values that cannot work, before anything is made of them: see `check_options`."""
        check_options(cls, values, spelled)


def defaults(owner: type) -> dict[str, Any]:
    """Each field's default, by its name."""
    return {each.name: each.default for each in fields(owner)}
