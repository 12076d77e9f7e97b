"""What a text is to begin with: a prompt from the command line or stdin, or ids."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress

from tinygpt.errors import InputError, say, show, tell
from tinygpt.storage import read_text

# Several books, of which a model reads what its window holds. For one word of this length GPT-2's
# tokenizer takes seconds and 200 MB, and it ends the process where memory is short.
MAX_PROMPT_BYTES = 4 << 20
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def read_prompt(given: str | None, file: str | None = None) -> str:
    """The prompt as text; "" when there is none, so that the text starts from nothing.

    Args:
        given: the prompt itself, or "-" for stdin; None for stdin too, if it is a pipe or a file.
        file: one whose text is the prompt, in place of all that.
    """
    text, piped = given or "", False
    if file is not None:
        text = _one_text(read_text(file, MAX_PROMPT_BYTES))
    elif given is None:
        with suppress(OSError, ValueError):  # reading from a terminal would only wait
            mode = os.fstat(sys.stdin.fileno()).st_mode
            piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    if piped or given == "-":
        text = _one_text(_decoded(_limited(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1))))
    if not text and (given, file) != (None, None):
        raise InputError("the prompt is empty: give some text, or leave it out")
    return text


def _one_text(text: str) -> str:
    """What was written into a file, without the mark before it, and the end of its last line."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")


def _limited(data: bytes) -> bytes:
    if len(data) > MAX_PROMPT_BYTES:
        most = f"{MAX_PROMPT_BYTES >> 20} MiB"
        raise InputError(f"the prompt on stdin has more than {most}: give its end, or less of it")
    return data


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not UTF-8: {error.reason}") from error


def typed_prompts() -> Iterator[str]:
    """The lines of stdin that are not empty, each as a prompt, until it ends.

    At a terminal they can be edited, and called back by the arrow keys, where Python has readline;
    Ctrl-C drops a line.
    """
    if not sys.stdin.isatty():
        while data := sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1):
            _limited(data)  # what stands behind would be no line
            try:
                text = _one_text(_decoded(data))
            except InputError as error:  # the next line may be better
                say(f"error: {error}")
                continue
            if text:
                yield text
        return
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            tell("\n")  # the terminal is still in the line
            return
        except (KeyboardInterrupt, UnicodeDecodeError):
            tell("\n")  # the terminal is still in the line
            continue
        if text := line.removesuffix("\r"):
            yield text


def stop_text(given: str) -> str:
    """A text with its escapes replaced: \\n, \\t, \\r, \\\\ and \\uXXXX, as JSON has them.

    A backslash before anything else is itself.

    Raises:
        InputError: when it is no valid Unicode then.
    """
    text = re.sub(
        r"\\(?:([ntr\\])|u([0-9a-fA-F]{4}))",
        lambda found: _NAMED[found[1]] if found[1] else chr(int(found[2], 16)),
        given,
    )
    try:  # two halves of a surrogate pair are one character
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise InputError(
            f"--stop {show(given)} has half of a surrogate pair, which is not valid Unicode"
        ) from None


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
