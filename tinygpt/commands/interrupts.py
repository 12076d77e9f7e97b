"""Signals that ask for an end: nothing is left half written, and what was made is kept."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any


class Ended(KeyboardInterrupt):
    """What a signal other than Ctrl-C's raises, to end the program as that one does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def status(error: KeyboardInterrupt) -> int:
    """The exit status of a program that was ended so."""
    return 128 + getattr(error, "number", signal.SIGINT)


def asking() -> list[int]:
    """The signals that ask this process for an end: Ctrl-C, a kill, and a terminal that is closed.

    A shell starts a job in the background with Ctrl-C ignored, and nohup a program with the
    terminal's end ignored; and so it stays.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def handled(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> Iterator[None]:
    """Let a handler have some signals meanwhile."""
    usual = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


@contextmanager
def ends_in_order() -> Iterator[None]:
    """A kill or a closed terminal raises an exception, so that files begun are taken away."""
    with handled(_end, [number for number in asking() if number != signal.SIGINT]):
        yield


def _send(number: int) -> None:
    """A signal to the thread that handles them, which may be waiting for something."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows, where nothing wakes it
        _thread.interrupt_main(number)


def _end(number: int, _: object = None) -> None:
    def lost(fault: Any) -> None:
        # Destructors complain about objects that were only half made, and what is raised inside of
        # one is lost: once more, then.
        if isinstance(fault.exc_value, KeyboardInterrupt):
            threading.Timer(0.1, _send, [number]).start()

    sys.unraisablehook = lost
    raise Ended(number)


def leave(number: int, _: object = None) -> None:
    """End the process as it stands, whatever its threads do: Python itself would wait for them."""
    os._exit(128 + number)


class Interrupts:
    """Signals while this is entered: once there is text, they ask for an end at the next token.

    Before, and if Ctrl-C comes again, it ends what is going on at once; the code behind the `with`
    goes on. An exception inside tinygrad may be lost in a destructor, or leave it waiting for 30 s.
    """

    def __init__(self) -> None:
        self.came: int | None = None  # the first signal
        self.has_text = False  # to be set by whoever has shown the first token
        self._stack = ExitStack()

    def __enter__(self) -> Interrupts:
        self._stack.enter_context(handled(self._interrupt, asking()))
        return self

    def _interrupt(self, number: int, _: object) -> None:
        # A closed terminal tells its programs twice: the system does, and the shell.
        again = self.came is not None and number == signal.SIGINT
        self.came = self.came or number
        if again or not self.has_text:
            _end(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> bool:
        self._stack.close()
        return isinstance(error, Ended)
