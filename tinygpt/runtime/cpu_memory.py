"""Memory of the CPU's buffers, private to this process.

tinygrad shares its memory with processes that are started by a fork, so that parent and child would
write into one KV cache. And a page of shared memory takes half again as long to get; the weights of
GPT-2 are 120,000.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from tinygrad.device import Buffer, BufferSpec

_LEAST_BYTES = 1 << 20
_POPULATE_WRITE = 23  # of Linux 5.14 and later: all pages at once


@cache
def use() -> None:
    """Have tinygrad take private memory for buffers of the CPU, where the system has both."""
    if not sys.platform.startswith("linux"):
        return
    from tinygrad.runtime.ops_cpu import CPUAllocator

    shared = CPUAllocator._alloc

    def alloc(self: Any, size: int, options: BufferSpec) -> Any:
        if options.external_ptr is not None:
            return shared(self, size, options)
        try:
            memory = mmap.mmap(-1, size, mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE)
        except OSError as error:  # by this, tinygrad knows to give back first what it keeps
            raise MemoryError from error
        with suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        made = shared(self, size, replace(options, external_ptr=address))
        made.meta = memory  # which lives as long as the buffer
        return made

    usual = CPUAllocator._free
    going: deque[tuple[Any, int, object]] = deque()  # device, what it has to reach, memory

    def free(self: Any, buffer: Any, options: BufferSpec | None = None) -> None:
        # A kernel that was started may still use it. tinygrad waits for it here, which is within a
        # destructor, and would be for ever where garbage is collected in the thread that runs it.
        if buffer.mappings:  # another device knows the memory too
            usual(self, buffer, options)
        going.append((self.dev, self.dev.timeline_value - 1, buffer.meta))
        with suppress(IndexError):  # another thread may take the last
            while going[0][0].timeline_signal.value >= going[0][1]:
                going.popleft()

    inside: Any = CPUAllocator
    inside._alloc, inside._free = alloc, free


def populate(buffer: Buffer) -> None:
    """Get all pages of a buffer that is about to be written, at once where the system can."""
    memory = getattr(buffer._buf, "meta", None)
    if isinstance(memory, mmap.mmap) and buffer.nbytes >= _LEAST_BYTES:
        with suppress(OSError, ValueError, AttributeError):
            memory.madvise(_POPULATE_WRITE)
