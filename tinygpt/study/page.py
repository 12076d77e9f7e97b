"""A report as one HTML file that stands by itself: nothing comes from elsewhere."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np

from tinygpt.errors import one_line, visible
from tinygpt.study.report import Chart, Map, Part, Report, Table, written

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .15rem .7rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left }
td.text { text-align: left; font-family: ui-monospace, monospace; white-space: pre-wrap }
img { image-rendering: pixelated; width: min(100%, 32rem); border: 1px solid #767676 }
pre { white-space: pre-wrap; border-left: 3px solid #767676; padding-left: 1rem }
svg { max-width: 44rem; width: 100% }
figure { margin: 1rem 0 } p.note { color: #444 }
"""

# Colours that are told apart by who sees few, on white, and dashes for who sees none.
_PENS = (
    ("#0060a8", "none"), ("#b03a00", "6 3"), ("#4a6800", "2 3"), ("#7a2a8a", "9 3 2 3"),
    ("#595959", "1 4"), ("#806000", "12 5"),
)  # fmt: skip
_SLIDER = """
const frame = document.getElementById("frame"), all = document.querySelectorAll("section");
const show = () => all.forEach((each, i) => { each.hidden = i != frame.value; });
frame.addEventListener("input", show);
show();
"""


def page(report: Report) -> str:
    """The HTML of a report."""
    parts = _parts(report)
    if report.frames:
        parts.append(_film(report.frames))
    title = escape(one_line(report.title, 1000))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
        '\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _parts(report: Report) -> list[str]:
    return [_part(part) for part in report.parts]


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Map):
        return _figure(part)
    if isinstance(part, Chart):
        return _chart(part)
    return (
        f"<h2>{escape(part.title)}</h2>\n<pre>{escape(visible(part.text))}</pre>{_note(part.note)}"
    )


def _chart(chart: Chart) -> str:
    """Curves as one drawing, each with a name in its own colour and its own dashes."""
    points = [point for curve in chart.curves.values() for point in curve]
    xs, ys = zip(*points, strict=True)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    wide, tall = max(right - left, 1e-9), max(high - low, 1e-9)

    def place(point: tuple[float, float]) -> str:
        x, y = point
        return f"{50 + 640 * (x - left) / wide:.1f},{270 - 250 * (y - low) / tall:.1f}"

    drawn = []
    for number, (name, curve) in enumerate(chart.curves.items()):
        colour, dashes = _PENS[number % len(_PENS)]
        style = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"'
        drawn.append(f'<polyline {style} points="{" ".join(map(place, curve))}"/>')
        y = 24 + 20 * number
        drawn.append(
            f'<path {style} d="M560 {y - 4}h30"/><text x="596" y="{y}">{escape(name)}</text>'
        )
    marks = (
        f'<text x="50" y="290">{left:g}</text><text x="690" y="290" text-anchor="end">'
        f'{escape(chart.x)} {right:g}</text><text x="46" y="274" text-anchor="end">{low:.3g}</text>'
        f'<text x="46" y="26" text-anchor="end">{high:.3g}</text>'
    )
    title = escape(chart.title)
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 0 700 300" role="img" aria-label="{title}" font-size="12">'
        f'<path d="M50 20v250h640" fill="none" stroke="#767676"/>{marks}{"".join(drawn)}</svg>'
        f"</figure>{_note(chart.note)}"
    )


def _film(frames: list[Report]) -> str:
    """One frame at a time, chosen by a slider; all of them where scripts do not run."""
    shown = [
        f"<section><h2>{escape(one_line(frame.title))}</h2>\n"
        + "\n".join(_parts(frame))
        + "</section>"
        for frame in frames
    ]
    return (
        f'<p><label>Which one <input id="frame" type="range" min="0" max="{len(frames) - 1}" '
        f'value="0"></label></p>\n' + "\n".join(shown) + f"\n<script>{_SLIDER}</script>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = ["".join(map(_cell, row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f"<table>{title}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>" + (
        _note(table.note)
    )


def _cell(value: object) -> str:
    text = escape(one_line(written(value), 1000))
    return f'<td class="text">{text}</td>' if isinstance(value, str) else f"<td>{text}</td>"


def _figure(drawn: Map) -> str:
    title = escape(drawn.title)
    rows, columns = drawn.values.shape
    image = base64.b64encode(grey_png(drawn.values)).decode()
    source = f"data:image/png;base64,{image}"
    size = f'width="{columns}" height="{rows}"'
    words = f"{title}: {rows} rows, {columns} columns, darker is more"
    return (
        f'<figure><figcaption>{title}</figcaption><img {size} alt="{words}" src="{source}">'
        f"</figure>{_note(drawn.note)}"
    )


def _note(text: str) -> str:
    return f'\n<p class="note">{escape(text)}</p>' if text else ""


def grey_png(values: np.ndarray) -> bytes:
    """A picture of numbers from 0, which is white, to 1, which is black.

    Args:
        values: (height, width).
    Source: ISO/IEC 15948, "Portable Network Graphics".
    """
    grey = (255 * (1 - np.clip(values, 0, 1))).round().astype(np.uint8)
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()  # each row is led by the number of its filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    size = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    parts = ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
