"""How much memory the device in use has left, asked before anything large is taken.

For the CPU that is the machine's, within the limits of the process and of its control groups, as
containers and batch systems set them. For a GPU with memory of its own it is the GPU's.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinygrad import Device
from tinygrad.helpers import GlobalCounters

from tinygpt.errors import InputError

# Backends whose tensors lie in the machine's own memory.
SHARE_MEMORY = ("CPU", "METAL", "PYTHON", "NULL")


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory of the machine that can still be taken without swapping, within this process's control
    groups and its own limits; None if the system does not say.

    Args:
        root: where /proc and /sys are.
    """
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1]) * 1024
        return min([free, *_left_in_groups(root), *_left_in_process(root)])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_process(root: Path) -> Iterator[int]:
    """What the limits of the process itself leave it: those that `ulimit -v` and `-d` set."""
    with suppress(OSError, ValueError):
        files = [root / "proc/self" / name for name in ("limits", "status")]
        limits, status = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        for limit, used in (("Max address space", "VmSize"), ("Max data size", "VmData")):
            most = re.search(rf"^{limit} +(\d+)", limits, re.M)  # "unlimited" is no number
            taken = re.search(rf"^{used}:\s+(\d+) kB", status, re.M)
            if most and taken:
                yield max(0, int(most[1]) - int(taken[1]) * 1024)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group that limits this process's memory has left, from its own one up.

    A process names its groups by their path in a hierarchy, of which a container may see a part
    only: mountinfo says which part is mounted where.
    """
    with suppress(OSError, ValueError, IndexError):
        # The path in version 2's hierarchy under "", in version 1's under each controller.
        groups: dict[str, str] = {}
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(","), path)
        for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            part, place = before.split()[3:5]
            kind, _, options = after.split(maxsplit=2)
            if kind == "cgroup2":
                path, files = groups.get("", part), _VERSION_2
            elif kind == "cgroup" and "memory" in options.split(","):
                path, files = groups.get("memory", part), _VERSION_1
            else:
                continue
            inside = os.path.relpath(path, part)
            top = root / place.lstrip("/").replace("\\040", " ")
            group = top if inside.startswith("..") else Path(os.path.normpath(top / inside))
            for folder in [group, *(p for p in group.parents if p.is_relative_to(top))]:
                yield from _left_in(folder, *files)


_Files = tuple[tuple[str, ...], str, str]
# The files of limits, of what is used, and what stands before the lines of what can be given back.
# Above `memory.high` a group is slowed down until it hardly moves.
_VERSION_2: _Files = (("memory.max", "memory.high"), "memory.current", "")
_VERSION_1: _Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def _left_in(folder: Path, limits: tuple[str, ...], used: str, stat: str) -> Iterator[int]:
    """What one group has left under each of its limits. Files that were read count as used there,
    lately or not, but give way to whatever wants memory; shared memory does not."""
    for limit in limits:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            most = int((folder / limit).read_text(encoding="utf-8"))
            taken = int((folder / used).read_text(encoding="utf-8"))
            with suppress(OSError, ValueError):
                lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                counts = dict(line.split(maxsplit=1) for line in lines)
                cache = (f"{stat}inactive_file", f"{stat}active_file")
                taken -= sum(int(counts.get(name, 0)) for name in cache)
            yield max(0, most - max(0, taken))


def device_memory_bytes(name: str | None = None) -> int | None:
    """What a device (by default the one in use) has left; None if it does not say."""
    name = name or Device.DEFAULT
    kind = name.split(":")[0]
    if kind in SHARE_MEMORY:
        return available_memory_bytes()
    with suppress(Exception):  # whatever a driver raises
        device: Any = Device[name]
        if kind == "CUDA":
            return _cuda_memory_bytes(device)
        if kind == "CL":
            return _opencl_memory_bytes(device)
    return None


def _cuda_memory_bytes(device: Any) -> int | None:
    from tinygrad.runtime.autogen import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuCtxSetCurrent(device.context)
    status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return None if status else free.value


def _opencl_memory_bytes(device: Any) -> int | None:
    """All of it, less what tinygrad has taken: OpenCL does not say what is free."""
    from tinygrad.runtime.autogen import opencl

    total = ctypes.c_uint64()
    what, size = opencl.CL_DEVICE_GLOBAL_MEM_SIZE, ctypes.sizeof(total)
    status = opencl.clGetDeviceInfo(device.device_id, what, size, ctypes.byref(total), None)
    taken = GlobalCounters.mem_used_per_device[device.device]
    return None if status else max(0, total.value - taken)


def require_memory(needed_bytes: int, what: str) -> None:
    """Refuse what cannot fit on the device in use before any of it is allocated.

    Raises:
        InputError: when more is needed than there is free; silent where it cannot know.
    """
    free = device_memory_bytes()
    if free is not None and needed_bytes > free:
        kind = Device.DEFAULT.split(":")[0]
        on = "" if kind in SHARE_MEMORY else f" on {kind}"
        raise InputError(
            f"{what} needs {-(-needed_bytes >> 20):,} MiB of memory, of which {free >> 20:,} MiB "
            f"are free{on}: choose a smaller model or batch, close other programs, or raise the "
            "limit of memory where one is set"
        )
