"""Texts inside of records: JSON lines, JSON arrays and CSV, one record in memory at a time."""

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
_DELIMITERS = ",;\t"

Record = tuple[int, dict[str, Any]]  # its place in the bytes, and what it holds


class Records:
    """The records of a file.

    Attributes:
        where: the one being read, for an error.
    """

    def __init__(self, chunks: Iterable[bytes], is_csv: bool) -> None:
        """
        Args:
            chunks: the file's bytes, in UTF-8.
            is_csv: whether it is a table with names in its first row; JSON otherwise, an array of
                objects or one on each line.
        """
        self.where, self._chunks, self._is_csv = "line 1", iter(chunks), is_csv

    def __iter__(self) -> Iterator[Record]:
        """
        Raises:
            ValueError: for what is no such file.
        """
        if self._is_csv:
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
        for at, line in self._lines():
            if line.strip():
                yield at, parse_json(line)

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
        delimiter = max(_DELIMITERS, key=names.count)
        csv.field_size_limit(RECORD_BYTES)  # of the whole process, and nothing else reads any
        rows = csv.reader(chain([names], rest), delimiter=delimiter)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise ValueError(f"its columns {show(header)} have a name twice")
            start = at
            for row in rows:
                if row:  # an empty line is none
                    yield start, dict(zip(header, row, strict=False))
                start = at
        except csv.Error as error:
            raise ValueError(f"its CSV is damaged: {error}") from error


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
