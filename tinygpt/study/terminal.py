"""A report as text, as wide as the terminal."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from unicodedata import combining, east_asian_width

import numpy as np

from tinygpt.errors import one_line, visible
from tinygpt.study.report import BLANK, Chart, Map, Part, Report, Table, written

_SHADES, _ASCII_SHADES = " ░▒▓█", " .:-=+*#%@"
_WIDEST_CELL = 48


def lines(report: Report, width: int, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a report.

    Args:
        width: of the terminal, in columns.
        encoding: of what they are written to; what it lacks is written as in \\xe9, and one that
            has no blocks gets letters for shades.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        encoding = "ascii"
    yield from _wrapped(report.title, width, encoding)
    for part in report.parts:
        yield ""
        yield from _part(part, width, encoding)
        if part.note:
            yield from _wrapped(part.note, width, encoding)
    for frame in report.frames:
        yield ""
        yield from lines(frame, width, encoding)


def _part(part: Part, width: int, encoding: str) -> Iterator[str]:
    if isinstance(part, Table):
        yield from _table(part, width, encoding)
    elif isinstance(part, Map):
        yield from _map(part, width, encoding)
    elif isinstance(part, Chart):
        yield from _table(_points(part), width, encoding)
    else:
        yield part.title
        for line in visible(part.text).split("\n"):
            yield from _wrapped(line, width, encoding) if line else [""]


def _points(chart: Chart) -> Table:
    """Where each curve begins, is lowest and ends; a page has its picture."""
    rows: list[list[object]] = []
    for name, points in chart.curves.items():
        lowest = min(points, key=lambda point: point[1])
        rows.append([name, points[0][1], lowest[1], lowest[0], points[-1][1], points[-1][0]])
    columns = ("", "first", "lowest", f"at {chart.x}", "last", f"at {chart.x}")
    return Table(chart.title, columns, rows)


def _table(table: Table, width: int, encoding: str) -> Iterator[str]:
    if table.title:
        yield from _wrapped(table.title, width, encoding)
    columns = range(len(table.columns))
    cells = [
        [_shown(written(value), encoding, _WIDEST_CELL) for value in row] for row in table.rows
    ]
    rows = [list(table.columns), *cells]
    texts = [any(isinstance(row[i], str) for row in table.rows) for i in columns]
    wide = [max(_width(row[i]) for row in rows) for i in columns]
    content = [max([5, *(_width(row[i]) for row in cells)]) for i in columns]
    # Names of columns are cut first, then texts; a number is never cut: its column comes below.
    for least in (
        content,
        [12 if text else size for text, size in zip(texts, content, strict=True)],
    ):
        while sum(wide) + 2 * (len(wide) - 1) > width:
            over = [max(0, size - low) for size, low in zip(wide, least, strict=True)]
            if not any(over):
                break
            wide[over.index(max(over))] -= 1
    while len(wide) > 1 and sum(wide) + 2 * (len(wide) - 1) > width:
        wide.pop()
    for row in rows:
        parts = [
            _padded(cell, size, text) for cell, size, text in zip(row, wide, texts, strict=False)
        ]
        yield "  ".join(parts).rstrip()
    if len(wide) < len(rows[0]) and len(wide) > 1:
        below = [[row[0], *row[len(wide) :]] for row in table.rows]
        rest = Table("", (table.columns[0], *table.columns[len(wide) :]), below)
        yield ""
        yield from _table(rest, width, encoding)


def _shown(text: str, encoding: str, longest: int = 4000) -> str:
    """A text in one line, of characters that the encoding has."""
    return one_line(text, longest).encode(encoding, "backslashreplace").decode(encoding)


def _width(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese letters and pictures take two."""
    return sum(
        0 if combining(each) else 2 if east_asian_width(each) in "WF" else 1 for each in text
    )


def _padded(text: str, size: int, left: bool) -> str:
    """A text as wide as a column, cut where it is wider; at the left of it or the right."""
    if _width(text) > size:
        while _width(text) > size - 1:
            text = text[:-1]
        text += "~"
    space = " " * (size - _width(text))
    return text + space if left else space + text


def _map(drawn: Map, width: int, encoding: str) -> Iterator[str]:
    """A row a line, each number as wide as the terminal has room, below the columns' names."""
    if drawn.title:
        yield from _wrapped(drawn.title, width, encoding)
    shades = _SHADES
    try:
        shades.encode(encoding)
    except UnicodeEncodeError:
        shades = _ASCII_SHADES
    names = [_shown(row, encoding) for row in drawn.rows]
    label = min(max(map(_width, names), default=0), max(8, width // 4))
    room = max(1, width - label - 2)
    values = _narrowed(drawn.values, room)
    each = room // values.shape[1]
    if each > 3 and len(names) == values.shape[1]:
        heads = (_padded(name.strip('"'), each - 1, True) for name in names)
        yield (" " * (label + 2) + " ".join(heads)).rstrip()
    steps = 1 + np.clip((values * (len(shades) - 1)).astype(int), 0, len(shades) - 2)
    steps = np.where(values < BLANK, 0, steps)
    for name, row in zip(names, steps, strict=True):
        yield f"{_padded(name, label, False)}  {''.join(shades[i] * each for i in row)}".rstrip()


def _narrowed(values: np.ndarray, room: int) -> np.ndarray:
    """At most so many columns, each the highest of those that it stands for."""
    if values.shape[1] <= room:
        return values
    edges = np.linspace(0, values.shape[1], room + 1).astype(int)[:-1]
    return np.maximum.reduceat(values, edges, axis=1)


def _wrapped(text: str, width: int, encoding: str) -> Iterator[str]:
    line = ""
    for word in _shown(text, encoding).split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = ""
        line += f" {word}" if line else word
    yield line
