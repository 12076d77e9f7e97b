"""Text larger than memory: plain files and JSONL as a stream of pieces that break no token."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinygpt.errors import InputError, reason, show
from tinygpt.storage import byte_bar, parse_json

Piece = tuple[bool, str, bool]  # whether for validation; text; whether a document ends with it
PIECE_BYTES = 4 << 20
_WORD_LENGTH = 16 << 20  # characters without white space: no text, but it must not fill memory
_LINE_BYTES = 256 << 20  # more in one line of JSONL, and it surely is something else

# GPT-2's pattern never matches across a change from anything else to white space, nor looks over
# it: the tokens of what is before and behind are those of the whole. (Python counts as white space
# all that tiktoken does, and more.)
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Text in files: which, and where the part for validation starts."""

    files: dict[Path, os.stat_result]
    field: str | None  # of JSONL, the key that holds the text
    documents: bool  # whether it is several texts, each with an end, or one
    total: int  # bytes
    cut: int  # the first byte of the validation part, counted through all files

    @classmethod
    def find(cls, path: Path, field: str | None, val: float, leave_out: Path) -> Source:
        """The text in a file, or in all files of a folder, in the order of their paths.

        Args:
            val: the fraction at the end that is for validation.
            leave_out: a folder that is not looked into, as those with a dot in front are not.
        Raises:
            InputError: when there is no text, it cannot be read, or is JSONL without a field.
        """
        try:
            paths = _files_in(path, leave_out) if path.is_dir() else [path]
            files = {path: path.stat() for path in paths if path.is_file()}
        except OSError as error:
            raise InputError(f"cannot read {path}: {reason(error)}") from error
        if not files:
            raise InputError(f"no file {str(path)!r}, or none in it: give one of UTF-8 text")
        if field is None and (lines := [path for path in files if path.suffix == ".jsonl"]):
            raise InputError(f"{lines[0]} is JSONL: name the key that holds the text with --field")
        total = sum(stat.st_size for stat in files.values())
        if total == 0:
            raise InputError(f"{path} is empty: give some text")
        documents = field is not None or path.is_dir()
        return cls(files, field, documents, total, int(total * (1 - val)))

    def sha256(self) -> str:
        """The SHA-256 of one text's file; of several, of each one's length and bytes."""
        digest = hashlib.sha256()
        for path, stat in self.files.items():
            if self.documents:
                digest.update(b"%d\n" % stat.st_size)
            with _reading(path) as file:
                while data := file.read(PIECE_BYTES):
                    digest.update(data)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse files that were written to since `find`."""
        for path, then in self.files.items():
            with _reading(path) as file:
                now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise InputError(f"{path} changed while it was read: try again")

    def pieces(self, title: str, end: str = "") -> Iterator[Piece]:
        """Yield all of the text, the part for training first, under a progress bar.

        Args:
            title: what the bar says.
            end: text to put after each document.
        Raises:
            InputError: for a file that cannot be read, is not UTF-8, or not JSONL with the field.
        """
        start = 0
        with byte_bar(title, self.total) as bar:
            for path, stat in self.files.items():
                if self.field is None:
                    yield from self._plain(path, start, stat.st_size, end, bar.update)
                else:
                    for at, text in _json_lines(path, self.field, bar.update):
                        yield start + at >= self.cut, text + end, True
                start += stat.st_size

    def _plain(
        self, path: Path, start: int, size: int, end: str, count: Callable[[int], None]
    ) -> Iterator[Piece]:
        middle = _character_start(path, min(max(self.cut - start, 0), size))
        for is_val, first, last in ((False, 0, middle), (True, middle, size)):
            for text in recut(_decoded(path, first, last, count)):
                yield is_val, text, False
            if self.documents and first < last:
                yield is_val, end, True


def recut(texts: Iterable[str]) -> Iterator[str]:
    """The same text, cut only where GPT-2's pattern always cuts, unless a word has no end."""
    held = ""
    for text in texts:
        if cut := _CUT.match(text):
            yield held + cut[0]
            held = text[cut.end() :]
        else:
            held += text
        if len(held) > _WORD_LENGTH:
            yield held
            held = ""
    if held:
        yield held


def _files_in(source: Path, leave_out: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    found, left_out = [], os.path.realpath(leave_out)
    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and os.path.realpath(os.path.join(folder, name)) != left_out
        ]
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _character_start(path: Path, at: int) -> int:
    """The first position from `at` on that is not inside a UTF-8 character."""
    with _reading(path) as file:
        file.seek(at)
        following = file.read(3)
    return at + next((n for n, b in enumerate(following) if b & 0xC0 != 0x80), len(following))


def _decoded(path: Path, at: int, end: int, count: Callable[[int], None]) -> Iterator[str]:
    """The text between two positions in a file, in pieces that end anywhere."""
    rest = b""
    with _reading(path) as file:
        file.seek(at)
        while at < end and (data := file.read(min(PIECE_BYTES, end - at))):
            count(len(data))
            at += len(data)
            data = rest + data
            try:
                text, used = codecs.utf_8_decode(data, "strict", at == end)
            except UnicodeDecodeError as error:
                place = at - len(data) + error.start
                raise InputError(
                    f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at position {place}; "
                    "convert it, or leave it out"
                ) from error
            rest = data[used:]
            yield text


def _json_lines(path: Path, field: str, count: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """Each line's position and the text under `field`; lines without any are left out."""
    at = 0
    with _reading(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
            try:
                text = _text_in(line, field) if line.strip() else ""
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {reason(error)}") from error
            if text:
                yield at, text
            at += len(line)
            count(len(line))


def _text_in(line: bytes, field: str) -> str:
    if len(line) == _LINE_BYTES:
        raise ValueError(f"it has {_LINE_BYTES >> 20} MiB or more, too much for one document")
    content = parse_json(line)
    if not isinstance(text := content.get(field), str):
        raise ValueError(f"--field {show(field)} must name text, but it holds {show(content)}")
    text.encode()  # JSON can spell half of a surrogate pair
    return text
