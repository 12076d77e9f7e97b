"""The clang that compiles for the CPU: found where it is, and given to tinygrad.

tinygrad starts what the environment variable CC names, in one word. That is often another compiler,
which tinygrad's arguments mean nothing to, or a clang behind ccache. Here CC is one place of
several to look for a clang, the last of which is the wheel `ziglang`: it carries a whole one.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinygpt.errors import show

_NAME = re.compile(r"(?:.*[-_])?clang(?:-\d+(?:\.\d+)*)?(?:\.exe)?", re.IGNORECASE)
_NEWEST, _OLDEST = 30, 13  # of the versions that a system may have under their number alone


def command() -> tuple[str, ...] | None:
    """How to start a clang, or None where there is none.

    It is the one that CC names, alone or behind others as in "ccache clang"; else `clang` or
    `clang-N` on the PATH; else the one in the wheel `ziglang`; else what CC names by another name,
    as `cc` is a clang on a Mac.
    """
    given = tuple(os.environ.get(name, "") for name in ("CC", "PATH"))
    return _command(*given)


@functools.cache
def _command(cc: str, path: str) -> tuple[str, ...] | None:
    return next(_commands(cc, path), None)


def _commands(cc: str, path: str) -> Iterator[tuple[str, ...]]:
    words = [cc]  # a path may have spaces in it
    with suppress(ValueError):  # a quote without its second
        words += shlex.split(cc, posix=os.name != "nt")
    numbered = [f"clang-{number}" for number in range(_NEWEST, _OLDEST - 1, -1)]
    for name in (*filter(is_clang, words), "clang", *numbered):
        if found := shutil.which(name, path=path):
            yield (found,)
    wheel = find_spec("ziglang")
    if wheel and wheel.origin:
        zig = Path(wheel.origin).with_name("zig.exe" if os.name == "nt" else "zig")
        if os.access(zig, os.X_OK):
            yield (str(zig), "clang")
    for name in words:
        found = shutil.which(name, path=path) if name else None
        if found and not is_clang(name) and "clang version" in version((found,)):
            yield (found,)


def is_clang(program: str) -> bool:
    """Whether a program is a clang by its name."""
    return bool(_NAME.fullmatch(re.split(r"[/\\]", program)[-1]))


def version(start: tuple[str, ...]) -> str:
    """The first line in which a compiler says what it is; "" if it does not run."""
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        run = subprocess.run(
            [*start, "--version"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
        return run.stdout.splitlines()[0] if run.returncode == 0 else ""
    return ""


def missing() -> str:
    """That there is no clang, naming CC where that is why."""
    cc = os.environ.get("CC", "").strip()
    return f"no clang found (CC is {show(cc)}, which is none)" if cc else "no clang found"


def advice() -> str:
    """The command that brings a clang."""
    try:
        distribution("tinygpt")
    except PackageNotFoundError:  # run from its folder: pip might know another of that name
        return "pip install ziglang"
    return "pip install 'tinygpt[clang]'"


@functools.cache
def use() -> None:
    """Have tinygrad start the clang that `command` finds, whatever CC says."""
    inside: Any = import_module("tinygrad.runtime.support.compiler_cpu")
    inside.subprocess = SimpleNamespace(check_output=_check_output)


def _check_output(argv: list[str], **kwargs: Any) -> bytes:
    """As `subprocess.check_output`, with another program in front of tinygrad's arguments."""
    start = command()
    if start is None:
        raise FileNotFoundError(missing())
    if sys.platform == "win32":  # where a window would flash up
        kwargs["creationflags"] = subprocess.CREATE_NO_WINDOW
    return subprocess.check_output([*start, *argv[1:]], **kwargs)
