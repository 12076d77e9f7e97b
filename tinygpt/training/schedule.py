"""The course of the learning rate over a run."""

from __future__ import annotations

import math
from typing import Literal


def scheduled(
    step: int,
    steps: int,
    warmup_steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    start: float,
    end: float,
) -> float:
    """The learning rate of a step: linear warm-up to `start`, then its decay to `end`.

    Args:
        step: from 0.
        steps: how many there are; past them the rate is `end`.
        start, end: the highest rate and the last; a constant schedule stays at `start`.
    Source: nanoGPT, train.py, `get_lr`.
    """
    if step < warmup_steps:
        return start * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return start
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return end + left * (start - end)
