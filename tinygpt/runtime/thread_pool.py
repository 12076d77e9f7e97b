"""Threads of our own that wait in C for a table to run, and how C text gets into memory."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tinygrad import Device

from tinygpt.environment import MOST_THREADS  # `struct place` has a bed for each
from tinygpt.runtime.compiling import compile_all

# Looks at a counter before a thread goes to sleep: about 30 us.
_SPINS = 2000

# Held while a table is written or run, so that the pool and each table belong to one thread.
running = threading.Lock()
# Held while a step is captured: tinygrad notes what is captured in one list for the process.
building = threading.RLock()


class _Pool:
    """Threads that wait in runner.c, and the memory through which they are woken."""

    def __init__(self) -> None:
        self.program, self.run = _runner()
        size = 192 + 64 * MOST_THREADS
        self._memory = ctypes.create_string_buffer(size + 64)
        self.place = (ctypes.addressof(self._memory) + 63) // 64 * 64
        wait, post, self._make_bell = semaphores()
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


current: _Pool | None = None


def start_threads(threads: int) -> _Pool:
    global current
    current = current or _Pool()
    current.grow(threads)
    return current


@atexit.register
def stop() -> None:
    """End the threads; the next run starts new ones."""
    global current
    with running:
        if current is not None:
            current.stop()
            current = None


def _after_fork() -> None:
    """A child has none of its parent's threads, and its locks may stand as another held them."""
    global current, running, building
    current, running, building = None, threading.Lock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Bell(ctypes.c_void_p):
    """The address of a POSIX semaphore, and the memory there."""

    memory: ctypes.Array[ctypes.c_char]


def semaphores() -> tuple[int, int, Callable[[], Any]]:
    """The functions that wait for a semaphore and post it, and one that makes one.

    Raises:
        AttributeError: where the system has none that is known here.
    """
    library = ctypes.CDLL(None)
    if platform.system() == "Darwin":  # which has no unnamed semaphores of POSIX
        make = library.dispatch_semaphore_create
        make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_long]
        names = "dispatch_semaphore_wait", "dispatch_semaphore_signal"
        wait, post = (_address(getattr(library, name)) for name in names)
        return wait, post, lambda: make(0)

    def make_posix() -> _Bell:
        memory = ctypes.create_string_buffer(64)
        bell = _Bell(ctypes.addressof(memory))
        bell.memory = memory
        if library.sem_init(bell, 0, 0):
            raise OSError("sem_init failed")
        return bell

    return _address(library.sem_wait), _address(library.sem_post), make_posix


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def memcpy() -> int:
    """The address of the C library's memcpy, which is a call like any other."""
    return _address(ctypes.CDLL(None).memcpy)


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
    program, address = load(compile_all([runner_source()])[0], "run_table")
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int
    )
    return program, prototype(address)


@functools.cache
def make_caller(count: int) -> tuple[Any, int]:
    """Load a function that calls another with so many arguments."""
    return load(compile_all([caller_source(count)])[0], f"call_{count}")


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
