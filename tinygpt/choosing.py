"""How the rows of one step choose their tokens, each by settings of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tinygpt.sampling import Sampling, Step, logit_bias, steps_of


@dataclass(eq=False)
class Row:
    """How one text chooses."""

    settings: Sampling = field(default_factory=Sampling)
    seed: int = 0
    draws: int = 0  # how many tokens were chosen
    bias: np.ndarray | None = None  # float32 (V,)
    counts: np.ndarray | None = None  # float32 (2, V), where the settings count


def counts_of(ids: Sequence[int], written: int, vocab_size: int) -> np.ndarray:
    """float32 (2, V): how often each token is in a text, and in what was written of it.

    Args:
        written: how many of its last tokens were; the others are the prompt.
    """
    parts = ids, ids[max(0, len(ids) - written) :]
    return np.stack([np.bincount(part, minlength=vocab_size) for part in parts]).astype(np.float32)


class Choice(NamedTuple):
    """How the rows of one step choose: what `sampling.apply` and `pick` take, as arrays."""

    steps: Sequence[Step]  # their bounds arrays (B, 1), or (B, V)
    inputs: dict[str, np.ndarray]  # seeds, draw, drawn and counts, as far as they are needed


class Chooser:
    """Makes the choice of each step's rows; of the same rows most of it is the same again."""

    def __init__(self, vocab_size: int, any_settings: bool) -> None:
        """
        Args:
            vocab_size: how many tokens there are.
            any_settings: let rows without settings differ from all others alone, so that there are
                two kinds of steps. Else each has just what its rows need.
        """
        self.vocab_size, self.any_settings = vocab_size, any_settings
        self._known: dict[int, tuple[Sequence[Row], Choice]] = {}  # by size, of the last rows

    def clear(self) -> None:
        """Forget the last rows."""
        self._known.clear()

    def choice(self, rows: Sequence[Row]) -> Choice:
        """What these rows choose by."""
        size = len(rows)
        if size not in self._known or self._known[size][0] != rows:
            self._known[size] = rows, self._new(rows)
        steps, known = self._known[size][1]
        inputs = dict(known)
        if "seeds" in inputs:
            inputs["draw"] = np.array([row.draws for row in rows], np.int32)
        if any(row.counts is not None for row in rows):
            none = np.zeros((2, self.vocab_size), np.float32)
            counts = [none if row.counts is None else row.counts for row in rows]
            inputs["counts"] = np.stack(counts, axis=1)
        return Choice(steps, inputs)

    def _new(self, rows: Sequence[Row]) -> Choice:
        settings = [row.settings for row in rows]
        steps, inputs = steps_of(settings), dict[str, np.ndarray]()
        biased = any(row.bias is not None for row in rows)
        if self.any_settings and (steps or biased):
            steps, biased = steps_of(settings, every=True), True
            inputs["counts"] = np.zeros((2, len(rows), self.vocab_size), np.float32)
        if biased:
            none = np.zeros(self.vocab_size, np.float32)
            biases = np.stack([none if row.bias is None else row.bias for row in rows])
            steps = [Step(logit_bias, biases, False), *steps]
        drawn = [not each.greedy for each in settings]
        if self.any_settings or any(drawn):
            inputs["seeds"] = np.array([row.seed for row in rows], np.uint64)
        if self.any_settings or (any(drawn) and not all(drawn)):
            inputs["drawn"] = np.array(drawn, np.float32).reshape(-1, 1)
        return Choice(steps, inputs)
