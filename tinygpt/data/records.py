"""Texts inside of records: JSON lines, JSON arrays and CSV, one record in memory at a time.

A table is read as spreadsheets write it, one with tabs between its columns too: a cell that begins
with a quote goes on to the next single quote, through line ends, and a quote in it is doubled. A
quote inside a cell that begins without one is itself. What does not fit that is refused by its
line, since a guess about where a cell ends could lose text in silence.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from tinygpt.errors import show
from tinygpt.storage import parse_json, unique_keys

RECORD_BYTES = 256 << 20  # more in one record, and it surely is something else
_BETWEEN = re.compile(r"\s*([\[,\]]?)\s*")  # what stands before, between and behind array entries
_FORMS = "an array of objects, or one object on each line"
_EXPLAINED_BYTES = 64 << 20  # an object on several lines is not looked for in more

Record = tuple[int, dict[str, Any]]  # its place in the bytes, and what it holds


class Records:
    """The records of a file.

    Attributes:
        where: the one being read, for an error.
    """

    def __init__(self, chunks: Iterable[bytes], delimiters: str = "") -> None:
        """
        Args:
            chunks: the file's bytes, in UTF-8.
            delimiters: what may stand between the columns, the likeliest first, if it is a table
                with their names in its first row; it is JSON otherwise, an array of objects or
                one on each line.
        """
        self.where, self._chunks, self._delimiters = "line 1", iter(chunks), delimiters

    def __iter__(self) -> Iterator[Record]:
        """
        Raises:
            ValueError: for what is no such file.
        """
        if self._delimiters:
            return self._rows()
        begin = b""
        for chunk in self._chunks:
            begin += chunk
            if begin.strip():
                break
        self._chunks = chain([begin], self._chunks)
        return self._entries() if begin.lstrip().startswith(b"[") else self._objects()

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line with its place. Lines end at line feeds alone: JSON's texts may hold U+2028."""
        at, held, size = 0, list[bytes](), 0
        number = 1
        for chunk in chain(self._chunks, [b"\n"]):
            first, *others = chunk.split(b"\n")
            held.append(first)
            size += len(first)
            if size >= RECORD_BYTES:
                raise ValueError(f"it has {RECORD_BYTES >> 20} MiB or more, too much for one text")
            for other in others:
                line = b"".join(held)
                self.where = f"line {number}"
                yield at, line
                at, number = at + len(line) + 1, number + 1
                self.where = f"line {number}"
                held, size = [other], len(other)

    def _objects(self) -> Iterator[Record]:
        lines = self._lines()
        for at, line in lines:
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
                where = self.where
                words = _if_on_several_lines(chain([line], (more for _, more in lines)))
                self.where = where
                raise ValueError(words or str(error)) from error
            yield at, record

    def _entries(self) -> Iterator[Record]:
        decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
        text, done, at, sign, number = "", 0, 0, "[", 1
        texts = decoded(self._chunks)
        more: str | None = ""
        while more is not None:
            more = next(texts, None)
            text, done = text[done:] + (more or ""), 0
            if len(text) > RECORD_BYTES:
                raise ValueError(f"it has over {RECORD_BYTES >> 20} MiB, too much for one text")
            while match := _BETWEEN.match(text, done):
                self.where = f"entry {number}"
                if match.end() == len(text) and more is not None:
                    break  # what follows is not there yet
                if match[1] == "]" or (number == 1 and text.startswith("]", match.end())):
                    behind = match.end() + (match[1] != "]")
                    self._nothing_more(chain([text[behind:]], texts))
                    return
                if match[1] != sign:
                    raise ValueError(f"its JSON is damaged: no {sign!r} stands before it")
                try:
                    entry, end = decoder.raw_decode(text, match.end())
                except json.JSONDecodeError as error:
                    if more is not None:
                        break  # it may go on
                    raise ValueError(f"its JSON is damaged: {error.msg}") from error
                except RecursionError as error:
                    raise ValueError(f"its JSON is damaged: {error}") from error
                if not isinstance(entry, dict):
                    raise ValueError(f"{show(entry)} is not an object")
                yield at, entry
                at += len(text[done:end].encode())
                done, sign, number = end, ",", number + 1

    def _rows(self) -> Iterator[Record]:
        at = 0

        def lines() -> Iterator[str]:
            nonlocal at
            for place, line in self._lines():
                at = place + len(line) + 1
                yield line.decode() + "\n"

        rest = lines()
        names = next(rest, "")
        delimiter = max(self._delimiters, key=names.count)
        csv.field_size_limit(RECORD_BYTES)  # of the whole process, and nothing else reads any
        rows = csv.reader(chain([names], rest), delimiter=delimiter, strict=True)
        begin = 1
        try:
            header = next(rows, [])
            while header and not header[-1]:
                del header[-1]  # spreadsheets leave empty columns behind the last
            named = [name for name in header if name]
            if len(set(named)) < len(named):
                raise ValueError(f"its columns {show(header)} have a name twice")
            start, begin = at, rows.line_num + 1
            for row in rows:
                self.where = f"line {begin}"
                if any(row[len(header) :]):
                    raise ValueError(
                        f"it has more cells than the {len(header)} that the first line names: a "
                        f"text with {show(delimiter)} in it must stand in quotes"
                    )
                if row:  # an empty line is none
                    yield start, dict(zip(header, row, strict=False))
                start, begin = at, rows.line_num + 1
        except csv.Error as error:
            self.where = f"line {begin}"
            raise ValueError(f"its CSV is damaged: {_in_own_words(error)}") from error

    def _nothing_more(self, texts: Iterable[str]) -> None:
        for text in texts:
            if text.strip():
                self.where = "behind its array"
                raise ValueError(f"more follows, {show(text.strip())}: it must be {_FORMS}")


def _in_own_words(error: csv.Error) -> str:
    """What is wrong with a table, without advice for who opened the file in Python."""
    if "new-line" in str(error):
        return "a carriage return alone stands in it: let lines end in \\n or \\r\\n"
    if "limit" in str(error):
        return f"a cell has over {RECORD_BYTES >> 20} MiB: perhaps its quote is not closed"
    return (
        "the quote that begins a cell is not closed, or more stands behind the one that closes it "
        "(a quote inside of quotes is written twice)"
    )


def _if_on_several_lines(lines: Iterable[bytes]) -> str | None:
    """What is said of a valid object that goes on behind its first line; None of all else."""
    parts, size = list[bytes](), 0
    for line in lines:
        parts.append(line)
        size += len(line)
        if size > _EXPLAINED_BYTES:
            return None
    try:
        text = b"\n".join(parts).decode().lstrip()
        record, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "\n" not in text[:end]:
        return None
    lists = [key for key, held in record.items() if isinstance(held, list) and held]
    advice = f"; save the list under {show(lists[0])} alone" if len(lists) == 1 else ""
    return f"an object goes over several lines: it must be {_FORMS}{advice}"


def decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text of UTF-8 bytes that are cut anywhere.

    Raises:
        ValueError: where they are not UTF-8.
    """
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chunks:
        yield decoder.decode(chunk)
    decoder.decode(b"", True)


def text_in(record: dict[str, Any], field: str) -> str:
    """The text in a record: under one key, or under several with commas between them.

    Several are joined by line feeds; those that are empty are left out.

    Raises:
        ValueError: when there is none under a key, or it is no valid text.
    """
    keys = [field] if field in record else field.split(",")
    parts = [record.get(key) for key in keys]
    for key, part in zip(keys, parts, strict=True):
        if not isinstance(part, str):
            raise ValueError(f"--field {show(key)} must name text, but it holds {show(record)}")
    text = "\n".join(part for part in parts if part)
    text.encode()  # JSON can spell half of a surrogate pair
    return text
