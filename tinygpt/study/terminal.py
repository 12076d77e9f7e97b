"""A report as text, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tinygpt.errors import one_line, visible
from tinygpt.study.report import Chart, Map, Part, Report, Table, written

_SHADES, _ASCII_SHADES = " ░▒▓█", " .:-=+*#%@"
_WIDEST_CELL = 40


def lines(report: Report, width: int, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a report.

    Args:
        width: of the terminal, in columns.
        encoding: of what they are written to; one that has no blocks gets letters for shades.
    """
    yield one_line(report.title, 2 * width)
    for part in report.parts:
        yield ""
        yield from _part(part, width, encoding)
        if part.note:
            yield from _wrapped(part.note, width)
    for frame in report.frames:
        yield ""
        yield from lines(frame, width, encoding)


def _part(part: Part, width: int, encoding: str) -> Iterator[str]:
    if isinstance(part, Table):
        yield from _table(part, width)
    elif isinstance(part, Map):
        yield from _map(part, width, encoding)
    elif isinstance(part, Chart):
        yield from _chart(part, width)
    else:
        yield part.title
        for line in visible(part.text).split("\n"):
            yield from _wrapped(line, width) if line else [""]


def _chart(chart: Chart, width: int) -> Iterator[str]:
    """Where each curve begins, is lowest and ends; a page has its picture."""
    rows: list[list[object]] = []
    for name, points in chart.curves.items():
        lowest = min(points, key=lambda point: point[1])
        rows.append([name, points[0][1], lowest[1], lowest[0], points[-1][1], points[-1][0]])
    columns = ("", "first", "lowest", f"at {chart.x}", "last", f"at {chart.x}")
    yield from _table(Table(chart.title, columns, rows), width)


def _table(table: Table, width: int) -> Iterator[str]:
    if table.title:
        yield from _wrapped(table.title, width)
    columns = range(len(table.columns))
    cells = [[one_line(written(value), _WIDEST_CELL) for value in row] for row in table.rows]
    rows = [list(table.columns), *cells]
    texts = [any(isinstance(row[i], str) for row in table.rows) for i in columns]
    wide = [max(len(row[i]) for row in rows) for i in columns]
    content = [max([5, *(len(row[i]) for row in cells)]) for i in columns]
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
            _cut(cell, size).ljust(size) if text else _cut(cell, size).rjust(size)
            for cell, size, text in zip(row, wide, texts, strict=False)
        ]
        yield "  ".join(parts).rstrip()
    if len(wide) < len(rows[0]) and len(wide) > 1:
        below = [[row[0], *row[len(wide) :]] for row in table.rows]
        yield ""
        yield from _table(Table("", (table.columns[0], *table.columns[len(wide) :]), below), width)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "~"


def _map(drawn: Map, width: int, encoding: str) -> Iterator[str]:
    if drawn.title:
        yield from _wrapped(drawn.title, width)
    shades = _SHADES
    try:
        shades.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        shades = _ASCII_SHADES
    label = min(max((len(one_line(row)) for row in drawn.rows), default=0), max(8, width // 4))
    room = max(1, width - label - 2)
    values = _narrowed(drawn.values, room)
    steps = np.clip((values * len(shades)).astype(int), 0, len(shades) - 1)
    for name, row in zip(drawn.rows, steps, strict=True):
        yield f"{_cut(one_line(name), label):>{label}}  {''.join(shades[i] for i in row)}".rstrip()


def _narrowed(values: np.ndarray, room: int) -> np.ndarray:
    """At most so many columns, each the highest of those that it stands for."""
    if values.shape[1] <= room:
        return values
    edges = np.linspace(0, values.shape[1], room + 1).astype(int)[:-1]
    return np.maximum.reduceat(values, edges, axis=1)


def _wrapped(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in one_line(text, 4000).split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = ""
        line += f" {word}" if line else word
    yield line
