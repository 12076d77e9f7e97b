"""Runs a captured step of CPU kernels at once: a table of calls, walked by threads of our own.

tinygrad 0.13 starts each CPU kernel through a Python thread, which takes 25 us, and 100 us or more
on several threads. Here a step is a table (the address of each compiled function, its arguments,
how many threads run it, and whether threads must meet before it), and one C function, runner.c,
walks it. Nothing here knows what the kernels compute.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from tinygrad import Device
from tinygrad.helpers import CPU_COUNT

# The most threads that a call may have; `struct place` has a bed for each.
MOST_THREADS = 256
# The most arguments that runner.c passes on by itself. A function with more has a caller made.
MOST_ARGUMENTS = 256
# Looks at a counter before a thread goes to sleep: about 30 us.
_SPINS = 2000
# A call of one thread goes to another thread than the first where the first has so much more to do
# (operations and bytes, about 30 us): less than that, a meeting later on would eat up.
_WORTH_SPREADING = 300_000
# Words of `struct call` in runner.c in front of its arguments.
_HEADER = 8
_TICKS_AT = 6


class Access(NamedTuple):
    """A part of a buffer that a call is given."""

    buffer: int  # its number
    offset: int  # bytes
    size: int  # bytes
    reads: bool
    writes: bool


class Call(NamedTuple):
    """A function to call with pointers to parts of buffers, and then numbers."""

    name: str
    function: int  # its number
    accesses: tuple[Access, ...]
    values: tuple[int | str | None, ...]  # an integer, a variable's name, or the thread's number
    threads: int = 1
    work: float = 0.0  # operations and bytes, to weigh one call against another


class Placed(NamedTuple):
    """Where and when a call runs: on threads `first` and up, after a meeting or at once."""

    first: int
    meets: bool


def place_calls(
    calls: Sequence[Call], spaces: Sequence[tuple[int, int]], most: int
) -> list[Placed]:
    """Decide which thread runs each call, and where all threads must meet.

    A call must wait for those before it that wrote what it reads or writes, or read what it
    writes. Where all of these ran on the very thread that it runs on, it waits for them anyhow;
    else all threads meet before it. After a meeting nothing before it matters any more.

    Args:
        calls: in their order.
        spaces: for each buffer the number of its memory and where it starts in it. Buffers of the
            same number may overlap.
        most: how many threads there are; a call of one thread may go to any of them.
    Returns:
        One for each call.
    """
    placed = []
    # What was touched since threads last met, by memory, and then by which threads.
    touched: dict[int, dict[tuple[int, int, bool], set[tuple[int, int]]]] = {}
    loads = [0.0] * most
    for call in calls:
        spans = []
        for access in call.accesses:
            memory, base = spaces[access.buffer]
            start = base + access.offset
            spans.append((memory, start, start + access.size, access.writes))
        owners: set[tuple[int, int]] = set()
        for memory, start, end, writes in spans:
            for (a, b, wrote), threads in touched.get(memory, {}).items():
                if a < end and start < b and (wrote or writes):
                    owners |= threads
        first, meets = 0, False
        if call.threads > 1:
            meets = bool(owners)
        elif not owners:
            least = min(range(most), key=loads.__getitem__)
            first = least if loads[0] - loads[least] >= _WORTH_SPREADING else 0
        elif len(owners) == 1 and next(iter(owners))[1] == 1:
            first = next(iter(owners))[0]
        else:
            meets = True
        if meets:
            touched, loads = {}, [0.0] * most
        for i in range(first, first + call.threads):
            loads[i] += call.work / call.threads
        owner = (first, call.threads)
        for memory, start, end, writes in spans:
            known = touched.setdefault(memory, {})
            if writes:  # what lies wholly under it is done before it, and so before what follows
                for span in [s for s in known if start <= s[0] and s[1] <= end]:
                    del known[span]
            known.setdefault((start, end, writes), set()).add(owner)
        placed.append(Placed(first, meets))
    return placed


class Graph:
    """A table of calls that runs as often as wanted, with other inputs and other variables.

    It waits for nothing when it is dropped: a run has ended when `run` returns.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        functions: Sequence[int],
        addresses: Sequence[int],
        inputs: int = 0,
        keep: Any = None,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            calls: what to run, in an order in which it is right to run them one by one.
            functions: the address of each function.
            addresses: of each buffer in memory.
            inputs: the first so many buffers are inputs: `set_address` may move each of them, to
                memory of its own.
            keep: what must live as long as this, such as the buffers.
            threads: the most to use for calls of one thread; None is one a core.
        """
        self.keep = keep
        self.calls = tuple(calls)
        self.addresses = list(addresses)
        most = max([threads or CPU_COUNT.value, *(call.threads for call in calls)])
        if most > MOST_THREADS:
            raise ValueError(f"{most} threads: there can be {MOST_THREADS}")
        self.placed = place_calls(calls, _spaces(calls, addresses, inputs), most)
        self.threads = max(
            (p.first + call.threads for p, call in zip(self.placed, calls, strict=True)), default=1
        )
        self._callers: list[Any] = []
        words: list[int] = []
        at_buffer: dict[int, list[tuple[int, int]]] = {}  # (word, offset) by buffer
        at_variable: dict[str, list[int]] = {}
        self._starts: list[int] = []
        for call, (first, meets) in zip(calls, self.placed, strict=True):
            count = len(call.accesses) + len(call.values)
            core_at = -1
            if None in call.values:
                core_at = len(call.accesses) + call.values.index(None)
            caller = 0
            if count > MOST_ARGUMENTS:
                program, caller = make_caller(count)
                self._callers.append(program)
            meets = meets and self.threads > 1
            self._starts.append(len(words))
            words += [functions[call.function], caller, first, call.threads, meets, core_at, 0]
            words.append(count)
            for access in call.accesses:
                at_buffer.setdefault(access.buffer, []).append((len(words), access.offset))
                words.append(addresses[access.buffer] + access.offset)
            for value in call.values:
                if isinstance(value, str):
                    at_variable.setdefault(value, []).append(len(words))
                words.append(value if isinstance(value, int) else 0)
        # `start` in runner.c may read past the last call's arguments, though nobody uses that.
        words += [0] * (_HEADER + MOST_ARGUMENTS)
        # Memory of this process alone: tinygrad's buffers are shared with children after a fork.
        self._table = (ctypes.c_int64 * len(words))(*words)
        self._words = memoryview(self._table).cast("B").cast("q")
        self._address = ctypes.addressof(self._table)
        self._at_buffer = at_buffer
        self._at_variable = at_variable
        self.variables = tuple(at_variable)
        self._values: dict[str, int] = {}

    def set_address(self, buffer: int, address: int) -> None:
        """Move a buffer. Only to be called with `running` held."""
        if self.addresses[buffer] != address:
            self.addresses[buffer] = address
            words = self._words
            for at, offset in self._at_buffer.get(buffer, ()):
                words[at] = address + offset

    def set_variable(self, name: str, value: int) -> None:
        """Give a variable a value. Only to be called with `running` held."""
        if self._values.get(name) != value:
            self._values[name] = value
            words = self._words
            for at in self._at_variable.get(name, ()):
                words[at] = value

    def run(self, careful: bool = False) -> None:
        """Run all calls and wait for their end. Only to be called with `running` held.

        Args:
            careful: run them one by one, for buffers that overlap where they did not before.
        """
        pool = _pool
        if pool is None or pool.count < self.threads:
            pool = _start_threads(self.threads)
        pool.run(pool.place, self._address, self.threads, 0, careful)

    def describe(self) -> str:
        """How many calls there are, and how they are started, in a few words."""
        several = sum(call.threads > 1 for call in self.calls)
        meetings = sum(meets for _, meets in self.placed) if self.threads > 1 else 0
        return f"{len(self.calls)} kernels, {several} on several threads, {meetings} meetings"

    def ticks(self) -> list[tuple[str, int]]:
        """Each call's name and time so far, in the processor's ticks, with TINYGPT_PROFILE=1."""
        found = [self._words[start + _TICKS_AT] for start in self._starts]
        return [(call.name, ticks) for call, ticks in zip(self.calls, found, strict=True)]


def _spaces(calls: Iterable[Call], addresses: Sequence[int], inputs: int) -> list[tuple[int, int]]:
    """For `place_calls`: each input has a memory of its own, buffers that overlap share one."""
    sizes = [0] * len(addresses)
    for call in calls:
        for access in call.accesses:
            sizes[access.buffer] = max(sizes[access.buffer], access.offset + access.size)
    spaces = [(i, 0) for i in range(len(addresses))]
    end, memory = -1, -1
    for i in sorted(range(inputs, len(addresses)), key=addresses.__getitem__):
        if addresses[i] >= end:
            memory = i
        end = max(end, addresses[i] + sizes[i])
        spaces[i] = (memory, addresses[i])
    return spaces


# Held while a table is written or run, so that the pool and each table belong to one thread.
running = threading.Lock()


class _Pool:
    """Threads that wait in runner.c, and the memory through which they are woken."""

    def __init__(self) -> None:
        self.program, self.run = _runner()
        size = 192 + 64 * MOST_THREADS
        self._memory = ctypes.create_string_buffer(size + 64)
        self.place = (ctypes.addressof(self._memory) + 63) // 64 * 64
        wait, post, self._make_bell = _semaphores()
        ctypes.c_void_p.from_address(self.place + 128).value = wait
        ctypes.c_void_p.from_address(self.place + 136).value = post
        self._bells: list[Any] = []
        self.count = 0  # of threads, with the caller's
        self._threads: list[threading.Thread] = []

    def grow(self, threads: int) -> None:
        for i in range(self.count, threads):
            self._bells.append(bell := self._make_bell())
            at = self.place + 192 + 64 * i + 8
            ctypes.c_void_p.from_address(at).value = getattr(bell, "value", bell)
            if i:
                arguments = (self.place, None, 0, i, 0)
                thread = threading.Thread(
                    target=self.run, args=arguments, name=f"tinygpt-runner-{i}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        self.count = max(self.count, threads)

    def stop(self) -> None:
        self.run(self.place, None, self.count, 0, 0)
        for thread in self._threads:
            thread.join()


_pool: _Pool | None = None


def _start_threads(threads: int) -> _Pool:
    global _pool
    _pool = _pool or _Pool()
    _pool.grow(threads)
    return _pool


@atexit.register
def stop() -> None:
    """End the threads; the next run starts new ones."""
    global _pool
    with running:
        if _pool is not None:
            _pool.stop()
            _pool = None


def _after_fork() -> None:
    """A child has none of its parent's threads, and its locks may stand as another held them."""
    global _pool, running
    _pool, running = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _semaphores() -> tuple[int, int, Callable[[], Any]]:
    """The functions that wait for a semaphore and post it, and one that makes one.

    Raises:
        AttributeError: where the system has none that is known here.
    """
    library = ctypes.CDLL(None)
    if platform.system() == "Darwin":  # which has no unnamed semaphores of POSIX
        make = library.dispatch_semaphore_create
        make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_long]
        names = "dispatch_semaphore_wait", "dispatch_semaphore_signal"
        return *(_address(getattr(library, name)) for name in names), lambda: make(0)

    def make_posix() -> ctypes.c_void_p:
        memory = ctypes.create_string_buffer(64)
        bell = ctypes.c_void_p(ctypes.addressof(memory))
        bell.memory = memory
        if library.sem_init(bell, 0, 0):
            raise OSError("sem_init failed")
        return bell

    return _address(library.sem_wait), _address(library.sem_post), make_posix


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def missing() -> str | None:
    """What keeps this machine from running captured steps as one table, or None."""
    if os.environ.get("TINYGPT_GRAPH") == "0":
        return "TINYGPT_GRAPH=0"
    system, machine = platform.system(), platform.machine().lower()
    if system not in ("Linux", "Darwin"):
        return f"no threads of our own on {system}"
    if machine not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"no calling convention for {machine}"
    if type(Device["CPU"].renderer).__name__ != "ClangJITRenderer":
        return "the CPU's kernels are not compiled by clang"
    try:
        _semaphores()
    except (AttributeError, OSError):
        return "no semaphores in the C library"
    return None


def describe() -> str:
    """How captured steps of CPU kernels are started here, in one line for `tinygpt doctor`."""
    reason = missing()
    if reason:
        return f"tinygrad starts each kernel ({reason})"
    return f"one table a step, on up to {CPU_COUNT.value} threads of our own"


@functools.cache
def memcpy() -> int:
    """The address of the C library's memcpy, which is a call like any other."""
    return _address(ctypes.CDLL(None).memcpy)


def copy_bytes(target: int, source: int, size: int) -> None:
    """Copy memory by its addresses."""
    ctypes.memmove(target, source, size)


def runner_source() -> str:
    """runner.c as it is compiled, whose text the settings are a part of."""
    profile = "#define PROFILE\n" if os.environ.get("TINYGPT_PROFILE") == "1" else ""
    text = Path(__file__).with_name("runner.c").read_text(encoding="utf-8")
    return f"#define SPINS {_SPINS}\n{profile}{text}"


def caller_source(count: int) -> str:
    """C text of a function that calls another with so many arguments."""
    types = ", ".join(["word"] * count)
    values = ", ".join(f"a[{i}]" for i in range(count))
    body = f"((void (*)({types}))f)({values});"
    return f"typedef long long word;\nvoid call_{count}(word f, const word *a) {{ {body} }}\n"


@functools.cache
def _runner() -> tuple[Any, Callable[..., None]]:
    """The loaded runner, and its entry as a C function that runs without Python's lock."""
    program, address = load(compile_text(runner_source()), "run_table")
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int
    )
    return program, prototype(address)


@functools.cache
def make_caller(count: int) -> tuple[Any, int]:
    """Load a function that calls another with so many arguments."""
    return load(compile_text(caller_source(count)), f"call_{count}")


def compile_text(text: str) -> bytes:
    """C text compiled for the CPU device, as tinygrad compiles its kernels."""
    from tinygpt.runtime.compiling import compile_all

    return compile_all([text])[0]


_loaded: WeakValueDictionary[bytes, Any] = WeakValueDictionary()


def load(binary: bytes, name: str) -> tuple[Any, int]:
    """Compiled code into memory that may run, the same code once.

    Returns:
        The program, which must be kept as long as the address is used, and the address.
    """
    program = _loaded.get(binary)
    if program is None:
        _loaded[binary] = program = Device["CPU"].runtime(name, binary)
    return program, _address(program.fxn)
