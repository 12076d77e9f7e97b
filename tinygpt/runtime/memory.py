"""How much memory the machine has left, asked before anything large is taken."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tinygpt.errors import InputError


def available_memory_bytes() -> int | None:
    """Memory that can still be taken without swapping, within this process's cgroup; None if the
    system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1]) * 1024
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            group = Path("/sys/fs/cgroup")
            limit = int((group / "memory.max").read_text(encoding="utf-8"))
            free = min(free, limit - int((group / "memory.current").read_text(encoding="utf-8")))
        return free
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def require_memory(needed_bytes: int, what: str) -> None:
    """Refuse what cannot fit before any of it is allocated.

    Raises:
        InputError: when more is needed than the machine has free; silent where it cannot know.
    """
    free = available_memory_bytes()
    if free is not None and needed_bytes > free:
        raise InputError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB "
            "are free: choose a smaller model, or close other programs"
        )
