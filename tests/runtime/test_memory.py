"""How much memory there is, on systems that are made up as files: limits of containers and batch
systems, of both versions of control groups, and what a GPU has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tinygpt import InputError
from tinygpt.runtime import memory

GB = 10**9


@pytest.fixture
def system(tmp_path):
    """Makes a system of 8 GB: files by their paths, and what it then has left."""

    def left(**files: str) -> int | None:
        files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 7812500 kB\n", **files}
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return memory.available_memory_bytes(tmp_path)

    return left


def mounted(place: str, part: str = "/", version: int = 2, options: str = "rw") -> str:
    kind = "cgroup2" if version == 2 else "cgroup"
    return f"1 2 0:3 {part} {place} rw,relatime shared:1 - {kind} {kind} {options}\n"


OTHERS = "1 2 0:3 / / rw - ext4 /dev/sda rw\n1 2 0:3 / /proc rw - proc proc rw\n"


def group(
    folder: str, limit: object, used: int, cache: int = 0, active: int = 0, high: object = "max"
) -> dict[str, str]:
    """Files of a group of version 2."""
    stat = f"anon 5\nfile {2 * GB}\nshmem {GB}\ninactive_file {cache}\nactive_file {active}\n"
    files = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    files["memory.high"] = f"{high}\n"
    return {f"{folder}/{name}": text for name, text in files.items()}


def group_1(
    folder: str, limit: object, used: int, cache: int = 0, active: int = 0
) -> dict[str, str]:
    """Files of a group of version 1."""
    stat = f"inactive_file 0\ntotal_inactive_file {cache}\ntotal_active_file {active}\n"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    texts = (f"{limit}\n", f"{used}\n", stat)
    return {f"{folder}/{name}": text for name, text in zip(names, texts, strict=True)}


V2 = {"proc/self/mountinfo": OTHERS + mounted("/sys/fs/cgroup")}
V1 = {
    "proc/self/mountinfo": OTHERS
    + mounted("/sys/fs/cgroup/cpu", version=1, options="rw,cpu")
    + mounted("/sys/fs/cgroup/memory", version=1, options="rw,memory"),
    "proc/self/cgroup": "5:cpu:/elsewhere\n4:memory:/job/7\n0::/\n",
}


def limits(space: object, data: object) -> dict[str, str]:
    """Files that tell of a process's limits, and what it uses of them."""
    table = "Limit                     Soft Limit           Hard Limit           Units     \n"
    table += f"Max data size             {data:<20} unlimited            bytes     \n"
    table += f"Max address space         {space:<20} unlimited            bytes     \n"
    status = "Name:\tpython\nVmPeak:\t 9 kB\nVmSize:\t  500000 kB\nVmData:\t  250000 kB\n"
    return {"proc/self/limits": table, "proc/self/status": status}


CASES = {
    "no groups": ({}, 8 * GB),
    "no limit": (
        {**V2, "proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", "max", GB)},
        8 * GB,
    ),
    "a container that sees its group as the root": (
        {**V2, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", 4 * GB, GB)},
        3 * GB,
    ),
    "files that were read are not used": (
        {**V2, "proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", 4 * GB, 4 * GB, 3 * GB)},
        3 * GB,
    ),
    "files that were read twice are not used": (
        {
            **V2,
            "proc/self/cgroup": "0::/a\n",
            **group("sys/fs/cgroup/a", 4 * GB, 3 * GB, active=2 * GB),
        },
        3 * GB,
    ),
    "files that were read twice, version 1": (
        {**V1, **group_1("sys/fs/cgroup/memory/job/7", 4 * GB, 3 * GB, GB, GB)},
        3 * GB,
    ),
    "a limit that slows down, below the one that kills": (
        {**V2, "proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", 4 * GB, GB, high=2 * GB)},
        GB,
    ),
    "a limit that slows down, alone": (
        {**V2, "proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", "max", GB, high=2 * GB)},
        GB,
    ),
    "a limit that slows down, above the one that kills": (
        {**V2, "proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", 2 * GB, GB, high=4 * GB)},
        GB,
    ),
    "the limit of a group above": (
        {
            **V2,
            "proc/self/cgroup": "0::/user.slice/session 1/mine\n",
            **group("sys/fs/cgroup/user.slice", 2 * GB, GB),
            **group("sys/fs/cgroup/user.slice/session 1", "max", GB),
            **group("sys/fs/cgroup/user.slice/session 1/mine", 4 * GB, GB),
            **group("sys/fs/cgroup", "max", GB),
        },
        GB,
    ),
    "more used than the limit": (
        {**V2, "proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", GB, 2 * GB)},
        0,
    ),
    "version 1": ({**V1, **group_1("sys/fs/cgroup/memory/job/7", 4 * GB, 3 * GB, GB)}, 2 * GB),
    "version 1, above": (
        {
            **V1,
            **group_1("sys/fs/cgroup/memory/job/7", 9223372036854771712, 3 * GB),
            **group_1("sys/fs/cgroup/memory/job", 5 * GB, 3 * GB),
        },
        2 * GB,
    ),
    "a container that sees the path on its host": (
        {
            "proc/self/mountinfo": OTHERS
            + mounted("/sys/fs/cgroup/memory", "/docker/ab", 1, "rw,memory"),
            "proc/self/cgroup": "4:memory:/docker/ab\n",
            **group_1("sys/fs/cgroup/memory", 4 * GB, GB),
        },
        3 * GB,
    ),
    "a group outside of what is mounted": (
        {
            "proc/self/mountinfo": OTHERS + mounted("/sys/fs/cgroup", "/docker/ab"),
            "proc/self/cgroup": "0::/other\n",
            **group("sys/fs/cgroup", 4 * GB, GB),
        },
        3 * GB,
    ),
    "both versions": (
        {
            **V1,
            "proc/self/mountinfo": V1["proc/self/mountinfo"] + mounted("/sys/fs/cgroup/unified"),
            **group_1("sys/fs/cgroup/memory/job/7", 4 * GB, GB),
        },
        3 * GB,
    ),
    "limits of the process": (limits(5_000_000_000, 6_000_000_000), 4_488_000_000),
    "limits of the process, the one of its data": (limits(10**12, 2_000_000_000), 1_744_000_000),
    "limits of the process, both used up": (limits(500_000_000, 100_000_000), 0),
    "limits of the process, none": (limits("unlimited", "unlimited"), 8 * GB),
    "files that say nothing": (
        {"proc/self/mountinfo": "x\n", "proc/self/cgroup": "\0", "sys/fs/cgroup/memory.max": "1"},
        8 * GB,
    ),
    "a limit without a count of files": (
        {
            **V2,
            "proc/self/cgroup": "0::/\n",
            **group("sys/fs/cgroup", 4 * GB, GB),
            "sys/fs/cgroup/memory.stat": "inactive_file x\n",
        },
        3 * GB,
    ),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_memory_is_what_the_tightest_control_group_leaves(files, expected, system):
    assert system(**files) == expected


def test_memory_of_this_machine_is_known():
    assert memory.available_memory_bytes() > 10**8


def test_without_such_files_the_machines_whole_memory_counts(tmp_path):
    assert memory.available_memory_bytes(tmp_path) > 10**8


class _Gpu:
    """A card with 2 GB left, as CUDA and as OpenCL tell it."""

    device, device_id, context = "CL", None, None

    def cuCtxSetCurrent(self, context):
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = 2 * GB, 9 * GB
        return 0

    CL_DEVICE_GLOBAL_MEM_SIZE = 0x101F

    def clGetDeviceInfo(self, device, what, size, value, _):
        assert (what, size) == (self.CL_DEVICE_GLOBAL_MEM_SIZE, 8)
        value._obj.value = 5 * GB
        return 0


@pytest.mark.parametrize("kind", ["CUDA", "CL"])
def test_a_gpus_memory_is_what_counts_where_it_is_the_device(kind, monkeypatch):
    from tinygrad.runtime import autogen

    monkeypatch.setattr(autogen, "cuda", _Gpu(), raising=False)
    monkeypatch.setattr(autogen, "opencl", _Gpu(), raising=False)
    device = SimpleNamespace(DEFAULT=kind)
    opens = type("Devices", (SimpleNamespace,), {"__getitem__": lambda *_: _Gpu()})
    monkeypatch.setattr(memory, "Device", opens(**vars(device)))
    monkeypatch.setitem(memory.GlobalCounters.mem_used_per_device, "CL", 3 * GB)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 99 * GB)
    memory.require_memory(2 * GB, "this")
    words = f"this needs 2,862 MiB of memory, of which 1,907 MiB are free on {kind}: choose"
    with pytest.raises(InputError, match=words):
        memory.require_memory(3 * GB, "this")


def test_where_nothing_says_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: None)
    memory.require_memory(10**18, "anything")
    assert memory.device_memory_bytes("NOTHING") is None
