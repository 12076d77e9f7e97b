"""Captured steps on disk, in a table of their own in tinygrad's cache.

An entry is found by a digest of all that the step depends on. It holds its digest and that of its
content, so that one that is damaged, or was made for something else, is no entry at all.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import platform
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

from tinygrad import Device, Tensor
from tinygrad.helpers import CACHELEVEL, ContextVar

from tinygpt.runtime import as_written, clang, disk_cache

TABLE = "tinygpt_steps"
# Settings of tinygrad that change no kernel.
_BESIDE = {
    "DEBUG", "VIZ", "PROFILE", "TRACEMETA", "JIT", "CAPTURING", "TRACK_MATCH_STATS", "LRU",
    "CACHELEVEL", "ALLOW_DEVICE_USAGE", "SPEC", "CCACHE", "MAX_BUFFER_SIZE",
}  # fmt: skip
_PACKAGE = Path(__file__).parents[1]
_IMPORTED = time.time()


class NotKept(Exception):
    """A step depends on something that a later process would not know again."""


def wanted() -> bool:
    """Whether steps are kept: not with TINYGPT_STORE=0, nor without tinygrad's cache."""
    return os.environ.get("TINYGPT_STORE") != "0" and CACHELEVEL.value >= 1


def identity(value: object) -> object:
    """What a value is made of, as plain data whose `repr` is the same in another process.

    An object is its class and its attributes, without the values of tensors. A class or a function
    must be one of this package: one that stands elsewhere may be another next time. That it is as
    its file says, `digest` sees to.

    Raises:
        NotKept: for anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if isinstance(value, dict):
        return [(identity(name), identity(item)) for name, item in value.items()]
    if isinstance(value, FunctionType):
        if Path(value.__code__.co_filename).is_relative_to(_PACKAGE):
            return f"{value.__module__}.{value.__qualname__}"
        raise NotKept(value)
    if isinstance(value, type):
        return _class(value)
    return _class(type(value)), identity(vars(value))


def _class(kind: type) -> str:
    for part in kind.__mro__[:-1]:
        if not part.__module__.startswith("tinygpt."):
            raise NotKept(kind)
    return f"{kind.__module__}.{kind.__qualname__}"


def digest(what: object) -> str:
    """The key of a step that depends on something, by its `repr`, and on all that all do.

    Raises:
        NotKept: where code that computes was replaced, or a file of it changed.
    """
    if (constants := as_written.constants_of_code()) is None:
        raise NotKept("the code")
    settings = sorted(
        (name, repr(var.value)) for name, var in ContextVar._cache.items() if name not in _BESIDE
    )
    names = [n for n in os.environ if n.startswith("TINYGPT_") and n != "TINYGPT_STORE"]
    names += [n for n in os.environ if n == "JITBEAM"]
    environment = sorted((name, os.environ[name]) for name in names)
    target = str(Device[Device.DEFAULT].renderer.target)
    given = target, settings, environment, clang.command(), what
    text = repr((_machine(), _sources(), constants, *given))
    return hashlib.sha256(text.encode()).hexdigest()


def load(key: str) -> Any:
    """What was saved under a digest, or None where it is not there as it was saved."""
    found = disk_cache.read(TABLE, key)
    if not isinstance(found, bytes) or len(found) < 64:
        return None
    content = found[64:]
    if found[:64] != bytes.fromhex(key) + hashlib.sha256(content).digest():
        return None
    with suppress(Exception):
        return pickle.loads(content)
    return None


def save(key: str, value: Any) -> None:
    """Keep a value under a digest."""
    content = pickle.dumps(value)
    disk_cache.write(TABLE, key, bytes.fromhex(key) + hashlib.sha256(content).digest() + content)


@functools.cache
def _machine() -> tuple[str, ...]:
    """What compiled code depends on: versions, and what this processor can do."""
    features = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        telling = ("flags", "Features", "model name", "CPU part")
        features = "\n".join(sorted({x for x in lines if x.startswith(telling)}))
    return version("tinygrad"), sys.version, platform.system(), platform.machine(), features


def _sources() -> str:
    """A digest of this package's text, C and Python, whichever version it says it is.

    Raises:
        NotKept: when a file was changed after it was imported.
    """
    files = sorted(p for kind in ("py", "c", "h") for p in _PACKAGE.rglob(f"*.{kind}"))
    if any(path.stat().st_mtime > _IMPORTED for path in files):
        raise NotKept("the sources")
    return _digest_of(tuple(files))


@functools.cache
def _digest_of(files: tuple[Path, ...]) -> str:
    found = hashlib.sha256()
    for path in files:
        found.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    return found.hexdigest()
