"""Ctrl-C while text is written: what was made is kept."""

from __future__ import annotations

import signal
import sys
from types import TracebackType


class Interrupts:
    """Ctrl-C while this is entered: once there is text, it only asks for an end at the next token.

    Before, and if it comes again, it ends what is going on at once; the code behind the `with`
    goes on. An exception inside tinygrad may be lost in a destructor, or leave it waiting for 30 s.
    """

    def __init__(self) -> None:
        self.came = False
        self.has_text = False  # to be set by whoever has shown the first token
        self.usual = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Interrupts:
        # A shell starts a job in the background with Ctrl-C ignored, and so it stays.
        if self.usual is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, *_: object) -> None:
        again, self.came = self.came, True
        if again or not self.has_text:
            # Destructors complain about the objects that were only half made.
            sys.unraisablehook = lambda _: None
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> bool:
        if self.usual is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.usual)
        if kind is KeyboardInterrupt:
            self.came = True
        return kind is KeyboardInterrupt
