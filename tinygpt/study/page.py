"""A report as one HTML file that stands by itself: nothing comes from elsewhere."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html import escape

import numpy as np

from tinygpt.errors import one_line, visible
from tinygpt.study.report import Chart, Map, Part, Report, Table, written

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 80rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { line-height: 1.2; overflow-wrap: anywhere } p { max-width: 60rem }
table { border-collapse: collapse; font-size: .9rem }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
.text { text-align: left } td.text { font-family: ui-monospace, monospace; white-space: pre }
td.long { white-space: pre-wrap; min-width: 12rem }
.wide { overflow-x: auto; margin: 1rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #767676;
  padding-left: 1rem }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600 } .note { color: #444 }
.plot { display: grid; grid-template-columns: auto 1fr; gap: .2rem .5rem; max-width: 44rem;
  margin-top: .8rem; font-size: .85rem }
.plot svg { width: 100%; height: 16rem; border: solid #767676; border-width: 0 0 1px 1px;
  box-sizing: border-box; overflow: visible }
.axis { display: flex; justify-content: space-between }
.high { flex-direction: column; text-align: right; margin: -.6rem 0 } .low { grid-column: 2 }
.curves { list-style: none; padding: 0; margin: .3rem 0; font-size: .85rem }
.curves li { display: inline-block; margin-right: 1.5rem }
polyline, .curves path { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke }
image { image-rendering: pixelated } .map text { font: 12px ui-monospace, monospace }
#frame { width: min(100%, 32rem); display: block }
"""

# Colours that are told apart by who sees few, on white, and dashes for who sees none.
_PENS = (
    ("#0060a8", "none"), ("#b03a00", "6 3"), ("#4a6800", "2 3"), ("#7a2a8a", "9 3 2 3"),
    ("#595959", "1 4"), ("#806000", "12 5"),
)  # fmt: skip
_SHORT = 24  # the letters of a text that stands in one line
_SLIDER = """
const frame = document.getElementById("frame"), all = document.querySelectorAll("section");
const show = () => {
  all.forEach((each, i) => { each.hidden = i != frame.value; });
  frame.setAttribute("aria-valuetext", all[frame.value].querySelector("h2").textContent);
};
frame.addEventListener("input", show);
show();
"""


def page(report: Report) -> str:
    """The HTML of a report."""
    parts = [f"<p>{escape(one_line(report.about, 400))}</p>"] * bool(report.about)
    parts += _parts(report)
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
    """Curves as one drawing, each with a name, its own colour and its own dashes.

    What is written stands beside the drawing, which is stretched, so that it can be read on a
    narrow screen too.
    """
    points = [point for curve in chart.curves.values() for point in curve]
    xs, ys = zip(*points, strict=True)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    wide, tall = max(right - left, 1e-9), max(high - low, 1e-9)

    def place(point: tuple[float, float]) -> str:
        x, y = point
        return f"{1000 * (x - left) / wide:.1f},{1000 - 1000 * (y - low) / tall:.1f}"

    drawn, names, words = [], [], []
    for number, (name, curve) in enumerate(chart.curves.items()):
        colour, dashes = _PENS[number % len(_PENS)]
        pen = f'stroke="{colour}" stroke-dasharray="{dashes}"'
        drawn.append(f'<polyline {pen} points="{" ".join(map(place, curve))}"/>')
        line = f'<svg width="32" height="8" aria-hidden="true"><path {pen} d="M0 4h32"/></svg>'
        names.append(f"<li>{line} {escape(name)}</li>")
        words.append(f"{name} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}")
    middle = f"{(low + high) / 2:.3g}" if high > low else ""
    up = "".join(f"<span>{each}</span>" for each in (f"{high:.3g}", middle, f"{low:.3g}"))
    across = (f"{left:g}", escape(chart.x), f"{right:g}")
    along = "".join(f"<span>{each}</span>" for each in across)
    title = escape(chart.title)
    return (
        f'<figure><figcaption>{title}</figcaption><ul class="curves">{"".join(names)}</ul>'
        f'<div class="plot"><div class="axis high">{up}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{title}: {escape("; ".join(words))}">{"".join(drawn)}</svg>'
        f'<div class="axis low">{along}</div></div></figure>{_note(chart.note)}'
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
        f'<p><label>Which of the {len(frames)}, by mouse or arrow keys: <input id="frame" '
        f'type="range" min="0" max="{len(frames) - 1}" value="0"></label></p>\n'
        + "\n".join(shown)
        + f"\n<script>{_SLIDER}</script>"
    )


def _table(table: Table) -> str:
    columns = range(len(table.columns))
    texts = [any(isinstance(row[i], str) for row in table.rows) for i in columns]
    head = "".join(
        f'<th scope="col"{_class(text)}>{escape(name)}</th>'
        for name, text in zip(table.columns, texts, strict=True)
    )
    rows = ["".join(map(_cell, row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    shown = f"<table>{title}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return _scrolled(shown, table.title or "table") + _note(table.note)


def _cell(value: object) -> str:
    text = one_line(written(value), 1000)
    return f"<td{_class(isinstance(value, str), len(text) > _SHORT)}>{escape(text)}</td>"


def _class(text: bool, long: bool = False) -> str:
    return f' class="text{" long" * long}"' if text else ""


def _scrolled(html: str, name: str) -> str:
    """What may be wider than the screen moves by itself, by the keyboard too."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{escape(name)}">{html}</div>'


def _figure(drawn: Map) -> str:
    """A picture with the tokens beside its rows and above its columns, as many as have room."""
    title, (rows, columns) = escape(drawn.title), drawn.values.shape
    side = max(1, min(20, 1000 // max(rows, columns)))  # of a place, in pixels
    names = [one_line(name, _SHORT) for name in drawn.rows]
    edge, every = 8 + 8 * max(map(len, names)), -(-16 // side)
    labels = []
    for i in range(0, rows, every):
        at, name = edge + side * i + side / 2 + 4, escape(names[i])
        labels.append(f'<text x="{edge - 5}" y="{at:g}" text-anchor="end">{name}</text>')
        labels.append(f'<text transform="translate({at:g} {edge - 5}) rotate(-90)">{name}</text>')
    source = "data:image/png;base64," + base64.b64encode(grey_png(drawn.values)).decode()
    width, height = side * columns, side * rows
    size = f'width="{width}" height="{height}"'
    words = "a row is a token that reads, a column one that is read; white is 0, black is 1"
    map_ = (
        f'<svg class="map" width="{edge + width + 1}" height="{edge + height + 1}" role="img" '
        f'aria-label="{title}: {rows} rows, {columns} columns, darker is more">{"".join(labels)}'
        f'<image x="{edge}" y="{edge}" {size} preserveAspectRatio="none" href="{source}"/>'
        f'<rect x="{edge}" y="{edge}" {size} fill="none" stroke="#767676"/></svg>'
    )
    return (
        f'<figure><figcaption>{title}</figcaption><p class="note">{words}</p>'
        f"{_scrolled(map_, drawn.title)}</figure>{_note(drawn.note)}"
    )


def _note(text: str) -> str:
    shown = re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
    return f'\n<p class="note">{shown}</p>' if shown else ""


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
