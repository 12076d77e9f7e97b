"""What a user is told, in one line each: what is wrong in the words that were typed, and news."""

from __future__ import annotations

import sys
from contextlib import suppress
from difflib import get_close_matches
from reprlib import Repr

_REPR = Repr()  # a value from a file may be of any length or depth
_REPR.maxstring = _REPR.maxother = 100
show = _REPR.repr


class InputError(ValueError):
    """Something given by the user is wrong. The message is one line, written for that user."""


def unknown(what: str, value: object, allowed: object) -> InputError:
    """The error for a `value` that is none of the `allowed` names, with the nearest one offered."""
    names = [str(name) for name in allowed]
    near = get_close_matches(str(value)[:100], names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {show(value)}: {hint}allowed are {', '.join(names)}")


class CheckpointError(InputError):
    """A file that came from elsewhere is damaged, incomplete or contradicts itself."""


def reason(error: Exception) -> str:
    """Why a call into the operating system or network failed, on one line, without its number."""
    cause = getattr(error, "reason", error)  # urllib wraps what happened
    known = getattr(cause, "strerror", None)
    text = known[:1].lower() + known[1:] if isinstance(known, str) else str(cause)
    return " ".join(text.split()) or type(cause).__name__


def say(text: str) -> None:
    """Tell the user, on stderr, since stdout is for results."""
    with suppress(OSError):  # a stderr that nobody reads is no reason to stop
        print(f"tinygpt: {text}", file=sys.stderr, flush=True)
