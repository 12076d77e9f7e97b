"""Whether the code that computes is, in memory, what its files say: whoever patches it knows why.

A captured step that is kept on disk is made from the files' text. A function or class that was
replaced computes something else, which no digest of files can tell.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache, cached_property, partial
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType
from typing import Any

_COMPUTES = re.compile(
    r"tinygpt\.((config|layers|model|sampling|session|runtime\.launch)"
    r"|(ops|training|evaluation)(\..*)?)"
)
_FROM = {"tinygpt", "tinygrad", "numpy", *sys.stdlib_module_names}
_PLAIN = (bool, int, float, str)


def constants_of_code() -> list[object] | None:
    """The numbers and texts that stand at the top of what computes; None where code was replaced.

    Numbers may be changed, as a captured step can be found by them; functions and classes may not.
    """
    found: list[object] = []
    for name in sorted(filter(_COMPUTES.fullmatch, list(sys.modules))):
        code, module = _code_of(name), sys.modules[name]
        if code is None or not _is_written(vars(module), code):
            return None
        if not all(map(_is_imported, _callables(vars(module), code))):
            return None
        plain = {k: v for k, v in vars(module).items() if k[:2] != "__" and _is_plain(v)}
        found.append((name, sorted(plain.items())))
    return found


@cache
def _code_of(name: str) -> CodeType | None:
    """The code of a module, as it was compiled from its file."""
    spec = sys.modules[name].__spec__
    loader: Any = spec.loader if spec else None
    return loader.get_code(name) if hasattr(loader, "get_code") else None


def _is_written(space: Mapping[str, Any], code: CodeType) -> bool:
    """Whether a module's or class's functions and classes have the code that its own defines."""
    for name, codes in _definitions(code).items():
        value = space.get(name)
        if codes[-1].co_flags & inspect.CO_OPTIMIZED:  # of a function; a class's body has it not
            functions = _functions(value)
            if not functions or any(each.__code__ not in codes for each in functions):
                return False
        elif not isinstance(value, type) or not _is_whole(value, codes[-1]):
            return False
    return True


def _is_whole(kind: type, code: CodeType) -> bool:
    """Whether a class has what its body defines, and no function or property besides."""
    added = vars(kind).keys() - _definitions(code).keys()
    for value in (vars(kind)[name] for name in added):
        if not hasattr(type(value), "__get__") or isinstance(value, type):
            continue
        if isinstance(value, GetSetDescriptorType | MemberDescriptorType):
            continue
        # What dataclass and NamedTuple make is of the class's module, or of the standard library.
        module = getattr(inspect.unwrap(getattr(value, "__func__", value)), "__module__", None)
        known = {None, kind.__module__, f"namedtuple_{kind.__name__}"}
        if module not in known and str(module).partition(".")[0] not in _FROM:
            return False
    return _is_written(vars(kind), code)


def _definitions(code: CodeType) -> dict[str, list[CodeType]]:
    """The functions and classes that a body defines: several of a name, as a property has."""
    found: dict[str, list[CodeType]] = {}
    for const in code.co_consts:
        if isinstance(const, CodeType) and not const.co_name.startswith("<"):
            found.setdefault(const.co_name, []).append(const)
    return found


def _functions(value: Any) -> list[FunctionType]:
    """What a function, method or property comes down to; nothing where it is none of them."""
    parts: list[Any] = [value.func if isinstance(value, cached_property) else value]
    if isinstance(value, property):
        parts = [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    parts = [inspect.unwrap(getattr(part, "__func__", part)) for part in parts]
    return parts if all(isinstance(part, FunctionType) for part in parts) else []


def _callables(space: Mapping[str, Any], code: CodeType) -> Iterator[Any]:
    """The functions that a module has under names that it does not define."""
    defined = _definitions(code)
    for name, value in space.items():
        if name not in defined and isinstance(value, FunctionType | MethodType | partial):
            yield getattr(value, "__func__", value)


def _is_imported(value: Any) -> bool:
    """Whether a function stands in the module that it says it is of, and that is a known one."""
    origin = getattr(value, "__module__", None) or ""
    own: Any = sys.modules.get(origin)
    for name in getattr(value, "__qualname__", "").split("."):
        own = getattr(own, name, None)
    return own is value and origin.partition(".")[0] in _FROM


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))
