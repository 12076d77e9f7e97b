"""What is told of a run while it trains: a line that a terminal renews, or else a line a minute."""

from __future__ import annotations

import shutil
import sys
import time

from tinygpt.errors import say, tell

_EVERY_S = 60
_BAR = 20  # characters at most, at least three


class Progress:
    """The line of the steps. It fits into the terminal's width, which is 80 columns by custom."""

    def __init__(self) -> None:
        self.width = shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else 0
        self.told = time.monotonic()

    def show(
        self,
        step: int,
        steps: int,
        loss: float,
        val_loss: float | None,
        tokens_per_s: float,
        left_s: float,
    ) -> None:
        """Show, where it is time to, how far the run is.

        Args:
            val_loss: the last; None where there was none.
            left_s: until the last step, in seconds.
        """
        facts = f"{step}/{steps}  loss {loss:.3f}"
        facts += "" if val_loss is None else f"  val {val_loss:.3f}"
        facts += f"  {tokens_per_s:,.0f} tokens/s  {duration(left_s)} left"
        if self.width:
            bar = min(_BAR, self.width - len(facts) - 1)
            done = bar * step // max(step, steps)
            line = f"{'#' * done}{'-' * (bar - done)} {facts}" if bar >= 3 else facts
            tell("\r" + line[: self.width].ljust(self.width))
        elif time.monotonic() - self.told >= _EVERY_S:
            self.told = time.monotonic()
            say(f"step {facts}")

    def clear(self) -> None:
        """Take the line away, for another."""
        if self.width:
            tell("\r" + " " * self.width + "\r")


def duration(seconds: float) -> str:
    """3725 -> 1:02:05, and 65 -> 1:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
