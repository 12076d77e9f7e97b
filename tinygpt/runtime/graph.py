"""Runs a captured step of CPU kernels at once: a table of calls, walked by threads of our own.

tinygrad 0.13 starts each CPU kernel through a Python thread, which takes 25 us, and 100 us or more
on several threads. Here a step is a table (the address of each compiled function, its arguments,
how many threads run it, and whether threads must meet before it), and one C function, runner.c,
walks it. Nothing here knows what the kernels compute.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from typing import Any

from tinygrad import Device

from tinygpt.runtime import device, thread_pool
from tinygpt.runtime.placing import Access, Call, place_calls, spaces_of

__all__ = ["Access", "Call", "Graph", "describe", "missing"]

# The most arguments that runner.c passes on by itself. A function with more has a caller made.
MOST_ARGUMENTS = 64
# Words of `struct call` in runner.c in front of its arguments.
_HEADER = 8
_TICKS_AT = 6


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
        most = max([threads or device.cpu_count(), *(call.threads for call in calls)])
        if most > thread_pool.MOST_THREADS:
            raise ValueError(f"{most} threads: there can be {thread_pool.MOST_THREADS}")
        self.placed = place_calls(calls, spaces_of(calls, addresses, inputs), most)
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
                program, caller = thread_pool.make_caller(count)
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
        """Move a buffer. Only to be called with `thread_pool.running` held."""
        if self.addresses[buffer] != address:
            self.addresses[buffer] = address
            words = self._words
            for at, offset in self._at_buffer.get(buffer, ()):
                words[at] = address + offset

    def set_variable(self, name: str, value: int) -> None:
        """Give a variable a value. Only to be called with `thread_pool.running` held."""
        if self._values.get(name) != value:
            self._values[name] = value
            words = self._words
            for at in self._at_variable.get(name, ()):
                words[at] = value

    def run(self, careful: bool = False) -> None:
        """Run all calls and wait for their end. Only to be called with `thread_pool.running` held.

        Args:
            careful: run them one by one, for buffers that overlap where they did not before.
        """
        ready = thread_pool.current
        if ready is None or ready.count < self.threads:
            ready = thread_pool.start_threads(self.threads)
        ready.run(ready.place, self._address, self.threads, 0, careful)

    def describe(self) -> str:
        """How many calls there are, and how they are started, in a few words."""
        several = sum(call.threads > 1 for call in self.calls)
        meetings = sum(meets for _, meets in self.placed) if self.threads > 1 else 0
        return f"{len(self.calls)} kernels, {several} on several threads, {meetings} meetings"

    def ticks(self) -> list[tuple[str, int]]:
        """Each call's name and time so far, in the processor's ticks, with TINYGPT_PROFILE=1."""
        found = [self._words[start + _TICKS_AT] for start in self._starts]
        return [(call.name, ticks) for call, ticks in zip(self.calls, found, strict=True)]


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
        thread_pool.semaphores()
    except (AttributeError, OSError):
        return "no semaphores in the C library"
    return None


def describe() -> str:
    """How captured steps of CPU kernels are started here, in one line for `tinygpt doctor`."""
    reason = missing()
    if reason:
        return f"tinygrad starts each kernel ({reason})"
    return f"one table a step, on up to {device.cpu_count()} threads of our own"
