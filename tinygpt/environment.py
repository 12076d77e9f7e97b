"""Environment variables that tinygrad reads, checked before it does, which is when it is imported.

tinygrad ends in a traceback where it expects a number and finds a word, and where a backend is
named as its releases of before 2026 had it. So this is asked first, and imports nothing of it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from tinygpt.errors import InputError, show

# tinygrad's old way to name a backend was to set a variable of its name to 1 -> DEV's word for it.
_BACKENDS = (
    "METAL", "AMD", "NV", "CUDA", "QCOM", "CL", "CPU", "DSP", "WEBGPU", "HIP", "NULL", "PYTHON",
    "RDMA",
)  # fmt: skip
OLDER = {"GPU": "CL", "CLANG": "CPU", "LLVM": "CPU:LLVM"}  # what it has forgotten since
_COMPILERS = (
    "CLANGJIT", "LLVM", "LVP", "X86", "CUDA", "PTX", "NVCC", "NAK", "HIP", "HIPCC", "IR3",
    "QCOMCL", "METAL", "CL", "INTEL", "WGSL", "NULL", "PYTHON",
)  # fmt: skip
# What tinygrad reads as a whole number, at its import or when it first needs it.
NUMBERS = (
    "ALIGNED", "ALL2ALL", "ALLOW_DEVICE_USAGE", "ALLOW_HALF8", "ALLOW_TF32", "ALLREDUCE_CAST",
    "ASSERT_COMPILE", "BEAM", "BEAM_DEBUG", "BEAM_DEV_TIMEOUT", "BEAM_ESTIMATE", "BEAM_LOCAL_MAX",
    "BEAM_LOG_SURPASS_MAX", "BEAM_MAX_TASKS_PER_CHILD", "BEAM_PADTO", "BEAM_STRICT_MODE",
    "BEAM_TIMEOUT_SEC", "BEAM_UOPS_MAX", "BEAM_UPCAST_MAX", "CACHELEVEL", "CAPTURE_PROCESS_REPLAY",
    "CAPTURING", "CCACHE", "CHECK_OOB", "CPU_COUNT", "DEBUG", "DEBUG_GC", "DEBUG_LINEARIZE",
    "DEBUG_RANGEIFY", "DEVICE_IN_FUNCTION_BUG", "DISABLE_FAST_IDIV", "DISABLE_HTTP_CACHE",
    "DISALLOW_BROADCAST", "EXPAND_SSA", "FIX_METAL_ICB", "FLOAT16", "FUSE_OPTIM", "GMMU",
    "GRAPH_ONE_KERNEL", "HCQ2", "HCQDEV_WAIT_TIMEOUT_MS", "IGNORE_BEAM_CACHE",
    "IGNORE_JIT_FIRST_BEAM", "IMAGE", "IOCTL", "JIT", "JITBEAM", "JIT_BATCH_SIZE",
    "LATE_ALLREDUCE", "LRU", "MAX_BUFFER_SIZE", "MAX_KERNEL_BUFFERS", "MM_DEBUG", "MV",
    "MV_BLOCKSIZE", "MV_ROWS_PER_THREAD", "MV_THREADS_PER_ROW", "NOLOCALS", "NOOPT",
    "NO_MEMORY_PLANNER", "NULL_ALLOW_COPYOUT", "OPENPILOT_HACKS", "PARALLEL", "PCONTIG",
    "PRINT_MATCH_STATS", "PROFILE", "REDUCEOP_SPLIT_SIZE", "REDUCEOP_SPLIT_THRESHOLD",
    "REMOTE_TIMEOUT", "REWRITE_STACK_LIMIT", "RING", "RING_ALLREDUCE_THRESHOLD", "SCACHE", "SPEC",
    "SPLIT_REDUCEOP", "TC", "TC_OPT", "TC_SELECT", "TEST_PICKLE", "THREADS", "TRACE", "TRACEMETA",
    "TRACK_MATCH_STATS", "TRANSCENDENTAL", "TUPLE_ORDER", "TYPED", "UNSAFE_ALLOW_JIT_BUFFER",
    "UNSAFE_DISABLE_MASK", "UPAT_COMPILE", "USE_ATOMICS", "VALIDATE_WITH_CPU", "VFIO", "VIZ",
    "WINO", "HCQ_NUM_SDMA",
)  # fmt: skip
_FLOATS = ("BEAM_MIN_PROGRESS",)
MOST_THREADS = 256  # that the graph runner can start
_MOST = 2**31 - 1  # what tinygrad writes into its cache, and hands to C, may not have more bits
_LIMITS = {
    "CPU_COUNT": (1, MOST_THREADS), "BEAM": (0, _MOST), "JITBEAM": (0, _MOST),
    "CAPTURING": (1, 1), "TYPED": (0, 0),  # without these tinygrad does not run at all
    "HCQ2": (0, 0), "IOCTL": (0, 0),  # they import what is in its sources, and not in its package
}  # fmt: skip
# How tinygrad calls a processor that Python calls otherwise.
_PROCESSORS = {"amd64": "x86_64", "aarch64": "arm64"}
_TYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16",
    "bfloat16", "float32", "float64", "half", "float", "double", "fp8e4m3", "fp8e5m2",
    "fp8e4m3fnuz", "fp8e5m2fnuz",
)  # fmt: skip


def check() -> None:
    """See whether tinygrad can read what the environment says.

    An empty variable is one that is not set. `NO_COLOR` may be anything, as its convention has it.
    Where there is no PATH, which tinygrad takes for granted, programs are where the system says.

    Raises:
        InputError: for the first variable that it cannot read, with what is allowed.
    """
    _tidy()
    for _, fault in _faults():
        raise InputError(fault)


def forget_faults() -> None:
    """Take out of this process's environment what `check` would refuse, for a help needs none."""
    _tidy()
    for name, _ in list(_faults()):
        del os.environ[name]


def _tidy() -> None:
    os.environ.setdefault("PATH", os.defpath)
    if dev := os.environ.get("DEV"):  # tinygrad and this package compare names in capitals
        os.environ["DEV"] = ";".join(map(_in_capitals, dev.split(";")))
    for name in (*NUMBERS, *_FLOATS, *_BACKENDS, "NO_COLOR", "CACHEDB"):
        if os.environ.get(name) == "":
            del os.environ[name]
    if "NO_COLOR" in os.environ:
        os.environ["NO_COLOR"] = "1"


def _in_capitals(target: str) -> str:
    """`cpu:x86` to `CPU:x86`: what stands behind a colon has a spelling of its own."""
    interface, plus, rest = target.rpartition("+")
    backend, colon, compiler = rest.partition(":")
    return interface + plus + backend.upper() + colon + compiler


def _faults() -> Iterator[tuple[str, str]]:
    """Each variable that cannot be read, and a line that says so."""
    for name in (*NUMBERS, *_FLOATS):
        if (value := os.environ.get(name)) is not None and (allowed := _refused(name, value)):
            yield name, f"the environment variable {name} is {show(value)}: it must be {allowed}"
    yield from _type_faults()
    cache = os.environ.get("CACHEDB", "")
    if cache == ":memory:" or cache.startswith("file:"):
        fact = f"the environment variable CACHEDB is {show(cache)}: it must be the path of a file"
        yield "CACHEDB", f"{fact}, not what SQLite has for other things; CACHELEVEL=0 does without"
    dev = os.environ.get("DEV", "")
    for target in dev.split(";"):
        if wrong := _target_fault(target):
            yield "DEV", f"the environment variable DEV is {show(dev)}: {wrong}"
            break
    yield from _old_faults(dev)


def _target_fault(target: str) -> str | None:
    """What is wrong with one of DEV's targets; None where nothing is seen to be."""
    interface, _, rest = target.rpartition("+")
    backend, _, compiler = rest.partition(":")
    if "+" in interface or compiler.count(":") > 1:
        form = "BACKEND, BACKEND:COMPILER or BACKEND:COMPILER:PROCESSOR"
        return f"it must be {form}, such as CPU"
    if interface.startswith("MOCK"):
        return "what stands in for a card is in tinygrad's sources, and not in its package"
    processor = compiler.partition(":")[2]
    if processor and backend in ("", "CPU"):
        here = _PROCESSORS.get(machine := platform.machine().lower(), machine)
        kind, _, which = processor.partition(",")
        if kind != here or not which:
            return f"the processor here is {here}, so it must be as in CPU::{here},native"
    return None


def _refused(name: str, value: str) -> str | None:
    """What a variable must be instead; None where it is right."""
    low, most = _LIMITS.get(name, (-_MOST, _MOST))
    if low == most:
        return None if value.strip() == str(low) else f"{low}; or unset it"
    is_float = name in _FLOATS
    try:
        if is_float or low <= int(value) <= most:
            float(value)
            return None
    except ValueError:
        pass
    return "a number; or unset it" if is_float else f"a whole number, {low} to {most}; or unset it"


def _type_faults() -> Iterator[tuple[str, str]]:
    default = os.environ.get("DEFAULT_FLOAT", "")
    if default.lower() not in ("", "float32", "float"):
        fact = "all is computed in float32; unset it (--dtype says how weights are held)"
        yield "DEFAULT_FLOAT", f"the environment variable DEFAULT_FLOAT is {show(default)}: {fact}"
    for name in ("SUM_DTYPE", "EMULATED_DTYPES"):
        value = os.environ.get(name, "")
        words = value.lower().split(",") if name == "SUM_DTYPE" else value.split(",")
        if value and not {word for word in words if word} <= set(_TYPES):
            fact = f"it must be of {', '.join(_TYPES)}; or unset it"
            yield name, f"the environment variable {name} is {show(value)}: {fact}"


def _old_faults(dev: str) -> Iterator[tuple[str, str]]:
    """What tinygrad no longer takes, each with what to write instead."""

    def line(name: str, instead: str) -> tuple[str, str]:
        fact = f"the environment variable {name} is {show(os.environ[name])}"
        return name, f"{fact}, as tinygrad had it before: unset it and set DEV={instead} instead"

    if not dev:  # else it is not looked at
        for name in (*_BACKENDS, *OLDER):
            value = os.environ.get(name, "0").strip()
            if value == "1":
                yield line(name, OLDER.get(name, name))
            elif name in _BACKENDS and not value.lstrip("+-").isdecimal():
                fact = "tinygrad looks there for a number while DEV names no backend"
                given = f"the environment variable {name} is {show(value)}"
                yield name, f"{given}: {fact}; unset {name}, or set DEV (DEV=CPU)"
    named = {target.rpartition("+")[2].partition(":")[0].upper() for target in dev.split(";")}
    for backend in [b for b in _BACKENDS if not dev or b in named or b == "CPU"]:
        for compiler in _COMPILERS:
            name = f"{backend}_{compiler}"
            if os.environ.get(name, "0") not in ("", "0"):
                yield line(name, f"{backend}:{compiler}")
        for what in ("CC", "IFACE"):
            name = f"{backend}_{what}"
            if os.environ.get(name):
                short = show(os.environ[name])[1:-1]
                yield line(name, f"{backend}:{short}" if what == "CC" else f"{short}+{backend}")
    emulators = {"NULL", "PYTHON"} & named
    for name, instead in (
        ("HCQ_VISIBLE_DEVICES", "NV, AMD or another with :0 before a +, such as PCI:0+AMD,"),
        ("EMULATE", f"{''.join(sorted(emulators)[:1])}:COMPILER:PROCESSOR"),
    ):
        if os.environ.get(name) and (name != "EMULATE" or emulators):
            yield line(name, instead)
