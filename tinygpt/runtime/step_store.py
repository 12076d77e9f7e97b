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
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tinygrad import Device
from tinygrad.helpers import CACHELEVEL, ContextVar

from tinygpt.runtime import disk_cache

TABLE = "tinygpt_steps"
# Settings of tinygrad that change no kernel.
_BESIDE = {
    "DEBUG", "VIZ", "PROFILE", "TRACEMETA", "JIT", "CAPTURING", "TRACK_MATCH_STATS", "LRU",
    "CACHELEVEL", "ALLOW_DEVICE_USAGE", "SPEC", "CCACHE", "MAX_BUFFER_SIZE",
}  # fmt: skip


def wanted() -> bool:
    """Whether steps are kept: not with TINYGPT_STORE=0, nor without tinygrad's cache."""
    return os.environ.get("TINYGPT_STORE") != "0" and CACHELEVEL.value >= 1


def digest(what: object) -> str:
    """The key of a step that depends on something, by its `repr`, and on all that all do."""
    settings = sorted(
        (name, repr(var.value)) for name, var in ContextVar._cache.items() if name not in _BESIDE
    )
    names = [n for n in os.environ if n.startswith("TINYGPT_") and n != "TINYGPT_STORE"]
    names += [n for n in os.environ if n in ("CC", "JITBEAM")]
    environment = sorted((name, os.environ[name]) for name in names)
    target = str(Device[Device.DEFAULT].renderer.target)
    text = repr((_machine(), _sources(), target, settings, environment, what))
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
        wanted = ("flags", "Features", "model name", "CPU part")
        features = "\n".join(sorted({x for x in lines if x.startswith(wanted)}))
    return version("tinygrad"), sys.version, platform.system(), platform.machine(), features


@functools.cache
def _sources() -> str:
    """A digest of this package's text, C and Python, whichever version it says it is."""
    folder = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c"), *folder.rglob("*.h")]):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()
