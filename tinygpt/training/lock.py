"""One training at a time in a run's folder, and who it is.

The lock is a folder with a description of its holder, in a file whose name is its own. A folder
that is not empty is never replaced by renaming another, on any system, so whoever renames first has
it, and it is never there without its description. To take an old lock away is to remove that file
by its name, and the folder if it is empty then: so nobody can hit a lock that another has put there
since. It needs no links and no locks of the system, which network drives lack.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.storage import read_json, temporary_beside

_FOLDER = ".lock"
_KEYS = {"pid", "host", "boot", "started", "at", "folder", "inode"}
_TRIES = 5


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder while the block runs; what was made for it and is empty then, goes.

    Raises:
        InputError: when another training holds it, saying who, or it cannot be written.
    """
    made = [folder for folder in (run, *run.parents) if not os.path.exists(folder)]
    try:
        try:
            run.mkdir(parents=True, exist_ok=True)
            name = _take(run)
        except OSError as error:
            raise InputError(f"cannot write {run}: {reason(error)}; pass another --out") from error
        try:
            yield
        finally:
            with suppress(OSError):  # what is wrong there is told of by what could not be saved
                _remove(run / _FOLDER, [name])
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()


def _take(run: Path) -> str:
    """Put a lock of this process into a folder, in place of one whose holder is gone.

    Returns:
        The name of the file that describes this process.
    """
    lock, mine, name = run / _FOLDER, _this_process(run), f"{secrets.token_hex(8)}.json"
    for _ in range(_TRIES):
        ready = temporary_beside(lock)
        ready.mkdir()
        try:
            (ready / name).write_text(json.dumps(mine), encoding="utf-8")
            os.rename(ready, lock)
            return name
        except OSError:
            if not lock.is_dir():  # what is in the way is no other lock
                raise
        finally:
            shutil.rmtree(ready, ignore_errors=True)
        holders = _holders(lock)
        for holder in holders.values():
            if holder is not None and _holds(holder, mine):
                who = f"process {show(holder['pid'])} on {show(holder['host'])}"
                raise InputError(
                    f"{run} is in use by another training, {who}, since {show(holder['at'])}: wait "
                    f"for it, stop it, or pass another --out (if that process is gone, remove "
                    f"{lock})"
                )
        _remove(lock, holders)
    raise InputError(f"{run} is being taken by other trainings: pass another --out")


def _remove(lock: Path, names: Iterable[str]) -> None:
    """Take a lock away that is described by these files, unless it has become another."""
    for name in names:
        (lock / name).unlink(missing_ok=True)
    with suppress(OSError):  # another has it now, or took it away
        lock.rmdir()


def _holders(lock: Path) -> dict[str, dict[str, Any] | None]:
    """What each file of a lock says of its holder, None where nothing that could be understood."""
    with suppress(FileNotFoundError):  # another process was faster
        return {name: _holder(lock / name) for name in os.listdir(lock)}
    return {}


def _holder(file: Path) -> dict[str, Any] | None:
    with suppress(CheckpointError):
        found = read_json(file)
        if isinstance(found.get("pid"), int) and found.keys() == _KEYS:
            return found
    return None


def _this_process(run: Path) -> dict[str, Any]:
    """What the lock of this process says; the folder too, since a lock is copied with its run."""
    pid, about = os.getpid(), run.stat()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot": _boot(),
        "started": _started(pid),
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
        "folder": str(run.resolve()),
        # Where one folder is seen under two paths; some drives have no such number.
        "inode": [about.st_dev, about.st_ino] if about.st_ino else None,
    }


def _holds(holder: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a holder is still there and has this folder, as far as can be known from here."""
    if holder["host"] != mine["host"]:
        return True
    is_here = holder["folder"] == mine["folder"] or holder["inode"] == mine["inode"] is not None
    is_there = holder["boot"] == mine["boot"] and holder["started"] == _started(holder["pid"])
    return is_here and is_there


def _boot() -> str | None:
    """What is another after each start of the machine; None where that is not to be known."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return None


def _started(pid: int) -> str | None:
    """When a process started, since its number is given out again; None where there is none."""
    if sys.platform == "win32":
        return _started_on_windows(pid)
    try:
        # The name stands in parentheses and may hold anything. Field 22 counts ticks since boot;
        # field 3 is Z for what has ended and waits to be asked for.
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    return run.stdout.strip() or None


def _started_on_windows(pid: int) -> str | None:
    import ctypes

    kernel, times = ctypes.windll.kernel32, (ctypes.c_uint64 * 4)()  # type: ignore[attr-defined]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(0x1000, False, pid)  # to ask what little anyone may
    if not handle:
        return None
    try:
        at = [ctypes.byref(times, 8 * number) for number in range(4)]
        kernel.GetProcessTimes(ctypes.c_void_p(handle), *at)
        ended = times[1]  # a process that has ended is there until nobody holds a handle of it
        return None if ended else str(times[0])
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))
