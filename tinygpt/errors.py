"""What a user is told, in one line each: what is wrong in the words that were typed, and news."""

from __future__ import annotations

import errno
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, TextIO

_REPR = Repr()  # a value from a file may be of any length or depth
_REPR.maxstring = _REPR.maxother = 100
show = _REPR.repr


_LONGEST = 1200  # letters of a line; the longest that says what is allowed has half of them
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def visible(text: str) -> str:
    """What a model wrote, without what would move a terminal's cursor or set its title."""
    return text.replace("\r\n", "\n").translate(_CONTROL)


def one_line(text: str, longest: int = _LONGEST) -> str:
    """What holds no line's end, moves no cursor and fills no screen, whatever is quoted in it.

    All that is printed of names and contents from elsewhere goes through this, or through `show`.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class InputError(ValueError):
    """Something given by the user is wrong. The message is one line, written for that user."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # it may quote names and contents from anywhere


def unknown(what: str, value: object, allowed: Iterable[object]) -> InputError:
    """The error for a `value` that is none of the `allowed` names, with the nearest one offered."""
    names = [str(name) for name in allowed]
    lower = {name.lower(): name for name in names}
    near = get_close_matches(str(value)[:100].lower(), lower, n=1, cutoff=0.8)
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    return InputError(f"unknown {what} {show(value)}: {hint}allowed are {', '.join(names)}")


# The limits that a number may have: how an error says them, and what holds for a value within.
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "low": ("{} or more", operator.ge),
    "above": ("above {}", operator.gt),
    "below": ("below {}", operator.lt),
    "most": ("at most {}", operator.le),
}


def check_int(name: str, value: object, low: int | None = None, below: int | None = None) -> None:
    """Refuse what is not a whole number with low <= value < below; None sets no limit.

    Args:
        name: what the user calls it: a flag as it was typed, or a field.
    Raises:
        InputError: with the name, the value, and what is allowed.
    """
    _check_number(name, value, "a whole number", int, low=low, below=below)


def check_float(
    name: str,
    value: object,
    low: float | None = None,
    below: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse what is not a finite number with low <= value < below and above < value <= most.

    Args:
        name: what the user calls it: a flag as it was typed, or a field.
    Raises:
        InputError: with the name, the value, and what is allowed.
    """
    kind = "a finite number" if below is None and most is None else "a number"
    _check_number(name, value, kind, int | float, low=low, above=above, below=below, most=most)


def _check_number(name: str, value: Any, kind: str, types: Any, **limits: float | None) -> None:
    given = {limit: bound for limit, bound in limits.items() if bound is not None}
    # True is an int to Python. An int may be too long for a float, but not for a comparison.
    largest = sys.float_info.max
    fits = isinstance(value, types) and not isinstance(value, bool)
    fits = fits and (types is int or -largest <= value <= largest)
    if not fits or not all(_LIMITS[limit][1](value, bound) for limit, bound in given.items()):
        words = [_LIMITS[limit][0].format(_figure(bound)) for limit, bound in given.items()]
        allowed = f"{kind}, {' and '.join(words)}" if words else kind
        raise InputError(f"{name} is {show(value)}: it must be {allowed}")


def _figure(bound: float) -> str:
    """A limit as people write it: 2**31 rather than 2147483648, 1 rather than 1.0."""
    power = int(bound).bit_length() - 1
    return f"2**{power}" if power >= 20 and bound == 2**power else f"{bound:g}"


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {show(value)}: it must be true or false")


class CheckpointError(InputError):
    """A file that came from elsewhere is damaged, incomplete or contradicts itself."""


def reason(error: BaseException) -> str:
    """Why a call into the operating system or network failed, on one line, without its number."""
    cause = getattr(error, "reason", error)  # urllib wraps what happened
    known = getattr(cause, "strerror", None)
    text = known[:1].lower() + known[1:] if isinstance(known, str) else str(cause)
    return one_line(" ".join(text.split()), _LONGEST // 4) or type(cause).__name__


def message_of(error: BaseException) -> str:
    """What a user is told of an error that ends the program."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        why = f" ({reason(error)})" if str(error) else ""
        return f"out of memory{why}: choose a smaller model, a smaller batch, or fewer samples"
    if isinstance(error, OSError):
        return f"{error.filename or 'cannot write'}: {reason(error)}"
    return f"{type(error).__name__}: {reason(error)}"


_talks = True


def talk(aloud: bool) -> None:
    """Whether this process tells anything: of several that would say the same, one does."""
    global _talks
    _talks = aloud


def say(text: str, below: str = "") -> None:
    """Tell the user, on stderr, since stdout is for results.

    Args:
        text: what is said. It may quote names and contents from anywhere, and becomes one line.
        below: a text to show under it, with its own lines.
    """
    line = f"tinygpt: {one_line(text)}"
    if below:
        line += f"\n{visible(below)}\n"
    tell(f"{line}\n")


def tell(text: str) -> None:
    """Write to stderr, where one that nobody reads any more is no reason to stop."""
    if not _talks:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Let a stream that cannot be written swallow what it still holds and what comes.

    Python writes it once more at exit, and ends with a status of its own where that fails.
    """
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what compilers and drivers write to stderr of their own accord."""
    errors = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
