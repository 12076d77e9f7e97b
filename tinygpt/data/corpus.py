"""Text larger than memory: plain files, JSON and CSV as a stream of pieces that break no token."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tinygpt.data.find_files import find_files
from tinygpt.data.records import Records, decoded, text_in
from tinygpt.errors import InputError, reason
from tinygpt.options import Checked, option
from tinygpt.storage import byte_bar, open_plain
from tinygpt.tokenizer.tokenizer import END

Piece = tuple[bool, str, bool]  # whether for validation; text; whether a document ends with it
PIECE_BYTES = 4 << 20
_WORD_LENGTH = 16 << 20  # characters without white space: no text, but it must not fill memory
END_LINE = f"\n{END}\n"  # what separates documents; its line feeds belong to none of them
_MARK = codecs.BOM_UTF8  # Windows puts it in front of a text

# GPT-2's pattern never matches across a change from anything else to white space, nor looks over
# it: the tokens of what is before and behind are those of the whole. (Python counts as white space
# all that tiktoken does, and more.)
_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)

_RECORDS = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".json": "JSON"}
_TABLES = {".csv": ",;\t", ".tsv": "\t,;"}  # and what may stand between their columns
# What files that people take for text begin with.
_OTHERS = {
    b"\xff\xfe": "text in UTF-16: save it in UTF-8, or `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "text in UTF-16: save it in UTF-8, or `iconv -f UTF-16 -t UTF-8`",
    b"\x1f\x8b": "compressed: unpack it first",
    b"PK\x03\x04": "a zip file (as .docx and .epub are): take the text out of it first",
    b"%PDF": "a PDF: take the text out of it first",
    b"PAR1": "Parquet: write its text as JSON lines first",
}


@dataclass(frozen=True)
class TextSettings(Checked):
    """How texts are read."""

    val: float = option(0.1, "the share for validation", limits={"low": 0, "below": 1})
    field: str | None = option(
        None, "the key of JSON, or column of CSV, with the text; A,B joins two by a line feed"
    )
    special_tokens: bool | None = option(
        None,
        f"read {END} in the text as that token (default: in JSON, CSV, several files, and where "
        "it is a line of its own, which separates documents)",
    )
    keep_crlf: bool = option(False, "leave \\r\\n as it is, instead of reading it as \\n")


@dataclass(frozen=True)
class Source:
    """Text in files: which, and where the part for validation starts.

    Places and sizes count bytes as they are read: without a byte order mark, \\r\\n as one.
    """

    files: dict[Path, tuple[os.stat_result, int]]  # and the size of each
    settings: TextSettings
    documents: bool  # whether it is several texts, each with an end, or one
    cut: int  # the first byte of the validation part, counted through all files
    size: int
    sha256: str  # of one text's file; of several, of each one's length and bytes
    has_crlf: bool  # whether keep_crlf may make a difference

    @classmethod
    def find(cls, sources: Sequence[str | Path], settings: TextSettings, leave_out: Path) -> Source:
        """The text in some files, and in all files of some folders, in the order of their paths.

        Args:
            sources: files, folders and patterns such as `texts/*.txt`.
            leave_out: a folder that is not looked into, as those with a dot in front are not.
        Raises:
            InputError: when there is no text, it cannot be read, or has records but no field.
        """
        paths, several = find_files(sources, leave_out)
        records = any(_needs_field(path, settings.field) for path in paths)
        several |= records or settings.field is not None
        separated = False
        digest, files, has_crlf = hashlib.sha256(), {}, settings.field is not None
        for path in paths:
            with _reading(path) as file:
                stat = os.fstat(file.fileno())
                begin = file.read(8192)
            _need_text(path, begin)
            if several:
                digest.update(b"%d\n" % stat.st_size)
            size, line = 0, b"\n"
            for chunk in _normal(path, False, digest.update):
                size += len(chunk)
                line = line[-len(END_LINE) :] + chunk
                separated |= END_LINE.encode() in line
            separated |= line.endswith(END_LINE[:-1].encode())  # the last line, not ended
            marked = len(_MARK) if begin.startswith(_MARK) else 0
            has_crlf |= size < stat.st_size - marked
            files[path] = stat, stat.st_size - marked if settings.keep_crlf else size
        total = sum(size for _, size in files.values())
        if total == 0:
            raise InputError(f"{paths[0]} is empty: give some text")
        cut = int(total * (1 - settings.val))
        documents = several or (separated and settings.special_tokens is not False)
        return cls(files, settings, documents, cut, total, digest.hexdigest(), has_crlf)

    def check_unchanged(self) -> None:
        """Refuse files that were written to since `find`."""
        for path, (then, _) in self.files.items():
            with _reading(path) as file:
                now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise InputError(f"{path} changed while it was read: try again")

    def pieces(self, title: str, names: Sequence[str] = (), end: str = "") -> Iterator[Piece]:
        """Yield all of the text, the part for training first, under a progress bar.

        Args:
            title: what the bar says.
            names: special tokens, which are in one piece, whether they are read as such or not.
            end: text to put after each document.
        Raises:
            InputError: for a file that cannot be read, is not UTF-8, or has no text in the field.
        """
        start, field = 0, self.settings.field
        mixed = any(_kind(path) for path in self.files)  # the others are plain texts then
        with byte_bar(title, sum(stat.st_size for stat, _ in self.files.values())) as bar:
            for path, (_, size) in self.files.items():
                chunks = _normal(path, self.settings.keep_crlf, lambda data: bar.update(len(data)))
                if field is None or (mixed and not _kind(path)):
                    yield from self._plain(path, chunks, self.cut - start, names, end)
                else:
                    for at, text in self._texts(path, chunks, field):
                        yield start + at >= self.cut, text + end, True
                start += size

    def _plain(
        self, path: Path, chunks: Iterator[bytes], cut: int, names: Sequence[str], end: str
    ) -> Iterator[Piece]:
        rest: list[bytes] = []
        train = _until(chunks, cut, rest, [name.encode() for name in (*names, "\r\n")])
        for is_val, part in (False, train), (True, chain(rest, chunks)):
            held = None
            try:
                for text in recut(decoded(part), names):
                    if held is not None:
                        yield is_val, held, False
                    held = text
            except UnicodeDecodeError as error:
                raise _not_utf8(path) from error
            if held is not None:
                yield is_val, held + end if self.documents else held, self.documents

    def _texts(self, path: Path, chunks: Iterator[bytes], field: str) -> Iterator[tuple[int, str]]:
        """Each text in a file of records, with its place; records without any are left out."""
        records = Records(chunks, _TABLES.get(path.suffix.lower(), ""))
        try:
            for at, record in records:
                text = text_in(record, field)
                if not self.settings.keep_crlf:
                    text = text.replace("\r\n", "\n")
                if text:
                    yield at, text
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path}, {records.where}: {reason(error)}") from error


def recut(texts: Iterable[str], names: Sequence[str] = ()) -> Iterator[str]:
    """The same text, cut only where GPT-2's pattern always cuts, unless a word has no end.

    Args:
        names: texts that are never cut.
    """
    spaced = [name for name in names if re.search(r"[ \n]", name[1:])]
    held = ""
    for text in texts:
        # A place is looked for in what is new, and for names that it may cut in all of it.
        held, cut = held + text, len(held)
        found = _CUT.match(held, cut)
        while found and (clear := _outside(held, found.end(), spaced)) < found.end():
            found = _CUT.match(held, 0, clear)
        if found:
            cut = found.end()
        elif len(held) > _WORD_LENGTH:
            cut = _outside(held, len(held), names)
        else:
            continue
        yield held[:cut]
        held = held[cut:]
    if held:
        yield held


def _outside(text: str, cut: int, names: Sequence[str]) -> int:
    """The last place up to `cut` that is in no name, nor in what may become one."""
    moved = True
    while moved:
        moved = False
        for name in names:
            for start in range(max(0, cut - len(name) + 1), cut):
                if name.startswith(text[start : start + len(name)]):
                    cut, moved = start, True
                    break
    return cut


def _until(
    chunks: Iterator[bytes], cut: int, rest: list[bytes], names: Sequence[bytes]
) -> Iterator[bytes]:
    """The bytes up to a cut, which is moved on to where it divides no character and no name.

    Args:
        rest: gets what the last chunk that was taken has behind the cut.
    """
    near, done, window = max(map(len, names)), 0, b""
    for chunk in chunks:
        window += chunk
        if done + len(window) >= cut + near:
            break
        if done + len(window) < cut - near:
            yield window
            done, window = done + len(window), b""
    place, moved = min(max(cut - done, 0), len(window)), True
    while moved:
        moved = False
        for name in names:
            at = window.find(name, max(0, place - len(name) + 1), place + len(name) - 1)
            if at >= 0 and 0 < place < len(window):
                place, moved = at + len(name), True
    while place < len(window) and window[place] & 0xC0 == 0x80:
        place += 1
    rest.append(window[place:])
    yield window[:place]


def _normal(path: Path, keep_crlf: bool, count: Callable[[bytes], object]) -> Iterator[bytes]:
    """The bytes of a text file, without a mark in front, and with \\n for \\r\\n.

    Args:
        count: is called with what is read of the file.
    """
    held, begins = b"", True
    with _reading(path) as file:
        while data := file.read(PIECE_BYTES):
            count(data)
            if held:
                data = held + data
            if begins:
                data, begins = data.removeprefix(_MARK), False
            held = b"\r" if data.endswith(b"\r") and not keep_crlf else b""
            if held:
                data = data[:-1]
            if not keep_crlf and b"\r\n" in data:
                data = data.replace(b"\r\n", b"\n")
            yield data
    yield held


def _kind(path: Path) -> str | None:
    """What a file has its texts in, if its ending is one of records."""
    ending = path.suffix.lower()
    return "CSV" if ending in _TABLES else _RECORDS.get(ending)


def _needs_field(path: Path, field: str | None) -> bool:
    """Whether a file has its texts in records, which need to be told where in them they are."""
    kind = _kind(path)
    if kind and field is None:
        part = "column" if kind == "CSV" else "key"
        raise InputError(
            f"{path} is {kind}: name the {part} that holds the text with --field, or give the file "
            "the ending .txt to read it as it stands"
        )
    return kind is not None


def _need_text(path: Path, begin: bytes) -> None:
    for mark, words in _OTHERS.items():
        if begin.startswith(mark):
            raise InputError(f"{path} is {words}")
    if b"\0" in begin:
        raise InputError(
            f"{path} has zero bytes, so it is no UTF-8 text: convert it, or leave it out (a "
            "pattern such as 'texts/*.txt' takes some files of a folder)"
        )


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_plain(path) as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error


def _not_utf8(path: Path) -> InputError:
    """Where a file ceases to be UTF-8, which what is read of it does not say."""
    rest, at = b"", 0
    with _reading(path) as file:
        while True:
            data = file.read(PIECE_BYTES)
            try:
                used = codecs.utf_8_decode(rest + data, "strict", not data)[1]
            except UnicodeDecodeError as error:
                byte, place = (rest + data)[error.start], at + error.start
                return InputError(
                    f"{path} is not UTF-8 text: byte {byte:#04x} at position {place}; convert it, "
                    "or leave it out"
                )
            if not data:
                break
            at, rest = at + used, (rest + data)[used:]
    return InputError(f"{path} changed while it was read: try again")
