"""What a study shows, as tables and maps, before it is known where: a terminal or a page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLANK = 0.05  # below which a terminal shows nothing in a map


@dataclass(frozen=True)
class Table:
    """Rows under named columns; numbers get the digits that matter, None is nothing."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True)
class Map:
    """Numbers from 0 to 1 as shades, the darkest for 1."""

    title: str
    values: np.ndarray  # float (rows, rows): each reads all
    rows: list[str]  # what stands before each row, and above each column
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    curves: dict[str, list[tuple[float, float]]]  # by name, (x, y) pairs in the order of x
    x: str  # what the axis is
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Words as they are, such as a sample or a command."""

    title: str
    text: str
    note: str = ""


Part = Table | Map | Chart | Text


@dataclass(frozen=True)
class Report:
    """What one command shows."""

    title: str
    parts: list[Part] = field(default_factory=list)
    result: Any = None  # the dataclass of arrays that is shown, for JSON
    frames: list[Report] = field(default_factory=list)  # the same look at several models
    about: str = ""  # which model and text it is about: a page says so, who typed it knows


def written(value: Any) -> str:
    """A value as a cell of a table has it."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return "" if math.isnan(value) else str(value)
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"
    return str(value)


def plain_data(value: Any) -> Any:
    """A result as JSON can hold it: dataclasses as objects, arrays as lists, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            each.name: plain_data(getattr(value, each.name)) for each in dataclasses.fields(value)
        }
    if isinstance(value, np.ndarray):
        return plain_data(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_data(each) for each in value]
    if isinstance(value, dict):
        return {str(name): plain_data(each) for name, each in value.items()}
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
