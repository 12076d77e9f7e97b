"""The machine below the tensors: which backend runs them, and how much memory there is.

tinygrad's environment variable `DEV` names the backend. Where it is not set, and tinygrad's choice
would be the CPU through a clang that is not installed, this module takes what works instead.
"""

from __future__ import annotations

import builtins
import os
import platform
import sys
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import tinygrad
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import ALL_DEVICES, Compiler
from tinygrad.dtype import DType
from tinygrad.helpers import CPU_COUNT, DEV, Context

from tinygpt.environment import MOST_THREADS, OLDER
from tinygpt.errors import InputError, reason
from tinygpt.runtime import clang, cpu_memory, disk_cache, webgpu
from tinygpt.runtime.postpone import postpone

# The compilers for the CPU besides clang, as DEV spells them, the best one first.
FALLBACKS = {"CPU:LLVM": "the LLVM library", "CPU:X86": "tinygrad's own x86-64 assembler"}

# Set by `select`: one line for the user about what was chosen in clang's place.
note: str | None = None


@cache
def forgive_cache() -> None:
    """Do without tinygrad's cache of compiled kernels where it is damaged, locked or out of reach.

    tinygrad would end there, or wait. What cannot be read is compiled again, and kept again if it
    can be. This replaces functions of tinygrad in this process. The command line does so when it
    starts; Python code that wants it calls this.
    """
    disk_cache.forgive()


@cache
def keep_stdout() -> None:
    """Have tinygrad print to stderr what DEBUG, VIZ and others ask it for: stdout is for results.

    This replaces `print` for tinygrad's modules in this process, those too that come later. The
    command line does so when it starts.
    """
    inside: Any = builtins
    real, folder = inside.print, os.path.join(os.path.dirname(tinygrad.__file__), "")

    def print_(*words: object, **how: Any) -> None:
        if how.get("file") is None and sys._getframe(1).f_code.co_filename.startswith(folder):
            how["file"] = sys.stderr
        real(*words, **how)

    inside.print = print_


@cache
def select() -> None:
    """Where DEV is unset, correct tinygrad's choice if it would not work, or work slowly.

    That is a CPU without clang, and an OpenCL driver that runs on the CPU: those kernels are slower
    than the CPU's own, and PoCL, the usual one, ends the whole process where it finds no linker.
    `note` then says what was chosen.

    The command line calls this when it starts, and a `GPT` when it is made: only the first call in
    a process does anything. It sets DEV in the environment too, for processes started from here.
    Where tensors were made before, they stay on tinygrad's device, and so does what comes after.
    """
    global note
    postpone()
    clang.use()
    cpu_memory.use()
    webgpu.use()
    if DEV.device:  # the user has chosen, in the environment or in Python
        return
    in_use = os.environ.get("DEV")  # tinygrad has set it when a tensor was made before
    chosen = in_use or ("CPU" if _no_gpu() else Device.DEFAULT)
    if chosen != "CPU" and (in_use or chosen != "CL" or not opencl_is_cpu()):
        return
    os.environ["DEV"] = ""  # tinygrad may have written its own choice there
    if clang.command():
        _choose("CPU")
        return
    for target, words in FALLBACKS.items():
        if works(target):
            _choose(target)
            note = (
                f"{clang.missing()}, so {words} compiles ({target}), and all runs 5 to 7 times "
                f"slower: `{clang.advice()}` brings a clang"
            )
            return


def _no_gpu(bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this is a PC under Linux without a GPU, which tinygrad takes 0.8 s to find out.

    There, each device on the PCI bus tells its class: 03 are displays, 12 accelerators.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        classes = [path.read_text(encoding="utf-8") for path in bus.glob("*/class")]
    except OSError:
        return False
    return not any(kind.startswith(("0x03", "0x12")) for kind in classes)


def _choose(target: str) -> None:
    DEV.value = os.environ["DEV"] = target


def opencl_is_cpu() -> bool:
    """Whether the OpenCL device is the processor, by the names that PoCL gives it."""
    with suppress(Exception):  # a driver that is not there may raise anything
        name: str = getattr(Device["CL"], "device_name", "")
        return name.startswith(("pthread", "cpu", "basic"))
    return False


def works(target: str) -> bool:
    """Whether a small kernel compiles and computes right with DEV at that value.

    A library that is there is not enough: LLVM before 15 refuses what tinygrad writes for it.
    """
    if target == "CPU:X86" and not _runs_assembled():
        return False
    with suppress(Exception), Context(DEV=target):
        return _adds_up(target.partition(":")[0])
    return False


def _runs_assembled(about: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor knows what tinygrad's assembler writes; else it would end the process.

    That is x86-64 with AVX2, which some virtual machines lack; where nothing says so, it is there.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with suppress(OSError, StopIteration):
        lines = about.read_text(encoding="utf-8").splitlines()
        return "avx2" in next(line for line in lines if line.startswith("flags")).split()
    return True


def _adds_up(device: str | None = None) -> bool:
    """Compile and run a small kernel: elementwise, then a sum, which needs memory of its own."""
    with Context(CACHELEVEL=0):  # an old result proves nothing
        return (Tensor([[1.0] * 64] * 3, device=device) + 1).sum(axis=1).tolist() == [128.0] * 3


def check(kernel: bool = True) -> None:
    """See whether the chosen backend is there, and, unless told not to, run one small kernel on it.

    Where none has been chosen yet, `select` does so first.

    Raises:
        InputError: when the backend does not exist or does not work, with the reason.
    """
    select()
    chosen = os.environ.get("DEV")  # by the user or `select`; tinygrad may write there, too
    try:
        _open(Device.DEFAULT)
        # The trial kernel may come from tinygrad's disk cache, which needs no compiler.
        if renderer() == "ClangJIT" and clang.command() is None:
            raise FileNotFoundError(clang.missing())
        if renderer() == "X86" and not _runs_assembled():
            raise RuntimeError("the processor lacks AVX2")
        if kernel and not _adds_up():
            raise RuntimeError("it computes wrong numbers")
    except Exception as error:
        name = chosen or Device.DEFAULT
        ways = ["unset DEV to let the program choose"] if chosen else []
        if isinstance(error, ModuleNotFoundError):
            reason = "tinygrad has no such backend"
            instead = OLDER.get(name.partition(":")[0].upper())
            ways.insert(0, f"set DEV to {instead or 'one of ' + ', '.join(ALL_DEVICES)}")
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".?")
            if Device.DEFAULT.startswith("WEBGPU"):
                ways.insert(0, webgpu.advice())
        if clang.command() is None:
            ways.append(f"`{clang.advice()}` brings a clang")
        ways.append("see `tinygpt doctor` for what this machine has")
        advice = ", ".join(ways[:-1]) + (", or " if ways[1:] else "") + ways[-1]
        raise InputError(
            f"the backend DEV={name} does not work: {reason}. {advice[0].upper()}{advice[1:]}"
        ) from error


def renderer(device: str | None = None) -> str:
    """Which of tinygrad's renderers writes a device's kernels: "ClangJIT", "X86" and so on."""
    return type(Device[device or Device.DEFAULT].renderer).__name__.removesuffix("Renderer")


def describe() -> str:
    """The backend in a few words, such as "CPU (clang)"."""
    device = Device.DEFAULT
    if name := _open(device):
        return f"{device} ({name})"
    words = {"ClangJIT": "clang", "CPULLVM": "LLVM"}.get(renderer(), renderer())
    return device if words.upper() == device else f"{device} ({words})"


def _open(name: str) -> str | None:
    """Open a device, and give what it calls itself, if anything."""
    if name.startswith("WEBGPU"):
        return webgpu.card(name)
    return getattr(Device[name], "device_name", None)


def cpu_count() -> int:
    """How many threads computation takes: tinygrad's CPU_COUNT, by default the cores there are."""
    return min(CPU_COUNT.value, MOST_THREADS)


def usable_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def use_threads(count: int) -> None:
    """Let computation take so many threads: to be said before anything is computed."""
    CPU_COUNT.value = count


def several(count: int) -> list[str]:
    """The names of the first so many devices of the backend in use.

    Raises:
        InputError: when one does not open.
    """
    names = [Device.canonicalize(f"{default()}:{i}") for i in range(count)]
    for i, name in enumerate(names):
        try:
            Device[name]
        except Exception as error:  # each backend has kinds of its own
            fact = f"{count} devices, of which {name} does not open ({reason(error)})"
            raise InputError(f"{fact}: give {max(1, i)} (--devices)") from error
    return names


def take_gpu(number: int) -> None:
    """Let this process compute on the GPU of a number, of those that it may use; a CPU has none.

    To be called before a device is opened. It is by the driver's own variable for CUDA, and for the
    others by tinygrad's way to name the devices that are to be seen.
    """
    name = Device.DEFAULT.partition(":")[0]
    if name == "CUDA":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known = number < len(seen) and seen[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number] if known else str(number)
    elif name in ("NV", "AMD"):
        DEV.value = replace(DEV.target(name), indices=str(number))


def default() -> str:
    """The name of the device in use, such as "CPU"."""
    return Device.DEFAULT


def holds(dtype: DType) -> bool:
    """Whether the device in use can hold numbers of a type, and compute with them."""
    device = Device[Device.DEFAULT]
    if dtype not in device.renderer.supported_dtypes():
        return False
    return dtype != dtypes.float16 or renderer() != "ClangJIT" or _widens_half(device.compiler)


@cache
def _widens_half(compiler: Compiler) -> bool:
    """Whether clang does so by itself: for an x86-64 without F16C it calls its library."""
    try:
        compiler.compile_cached("float widen(__fp16 *x) { return *x; }")
    except RuntimeError:  # clang calls a function of its library, which tinygrad does not link
        return False
    return True


def devices() -> dict[str, str]:
    """What tinygrad can open: "found" with its name, or why not, in a few words."""
    states = {}
    for name in ALL_DEVICES:
        try:
            states[name] = f"found, {_open(name) or 'opens'}"
        except Exception as error:  # whatever a driver that is not there raises
            fault = shorten(str(error) or type(error).__name__, 70, placeholder=" ...")
            fault += f"; {webgpu.advice()}" if name == "WEBGPU" else ""
            states[name] = f"no ({fault})"
    return states


def kernel_cache() -> tuple[Path, Exception | None]:
    """The file in which compiled kernels are kept, and what keeps it from being used."""
    return disk_cache.file(), disk_cache.fault()


def takes_c(name: str) -> bool:
    """Whether operations are C on a device: it is a CPU for which clang compiles, and neither
    TINYGPT_KERNELS=0 nor the flag `--plain` says otherwise."""
    if os.environ.get("TINYGPT_KERNELS") == "0":
        return False
    return name.startswith("CPU") and renderer("CPU") == "ClangJIT"


def describe_operations(devices: int = 1) -> str:
    """Which form of the operations runs on the default device, in two words.

    Args:
        devices: how many a tensor lies on.
    """
    return f"{'C' if devices == 1 and takes_c(Device.DEFAULT) else 'plain'} operations"
