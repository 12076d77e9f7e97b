"""What a text is to begin with: a prompt from the command line or stdin, or ids."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress

from tinygpt.errors import InputError, show


def read_prompt(given: str | None) -> str:
    """The prompt as text; "" when there is none, so that the text starts from nothing."""
    text, piped = given or "", False
    if given is None:
        with suppress(OSError, ValueError):  # reading from a terminal would only wait
            mode = os.fstat(sys.stdin.fileno()).st_mode
            piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if piped or given == "-":
        try:
            # Windows puts a mark before a text, and \r at each line's end.
            text = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
            text = text.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"the prompt on stdin is not UTF-8: {error.reason}") from error
    if not text and given is not None:
        raise InputError("the prompt is empty: give some text, or leave it out")
    return text


def read_ids(given: str | None, prompt: str | None) -> list[int] | None:
    """The ids that stand in place of a prompt; None when there are none."""
    if given is None:
        return None
    if prompt is not None:
        raise InputError("--ids and a prompt are two texts to continue: give one of them")
    words = given.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() for word in words):
        raise InputError(f"--ids is {show(given)}: it must be like 15496,995")
    return [int(word[:12]) for word in words]
