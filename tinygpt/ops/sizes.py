"""Whole numbers, and those that are known only when a captured step runs."""

from __future__ import annotations

from tinygrad import Tensor, UOp

# A whole number, or a bound Variable: a step captured with one runs with any of its values.
Whole = int | UOp
# Where tokens stand: at one position in all rows, or int32 (B,), one for each row.
Position = Whole | Tensor


def shape(x: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor, none of which hangs on a Variable."""
    sizes = tuple(size for size in x.shape if isinstance(size, int))
    assert len(sizes) == x.ndim, f"{x.shape} hangs on a Variable"
    return sizes


def plus(x: Tensor, n: Position) -> Tensor:
    """x + n, of whatever kind n is."""
    return x + n  # type: ignore[operator]  # tinygrad adds a UOp too: its hints leave that out
