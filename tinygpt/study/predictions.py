"""How well each token of a text was foreseen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygpt.study.inside import Inside, at, log_softmax


@dataclass(frozen=True)
class Predictions:
    """Of each of T tokens, what the model thought of it before it had seen it.

    The first has nothing before it: its loss and rank are NaN and 0, its entropy and likeliest too.
    """

    ids: list[int]  # the T tokens
    loss: np.ndarray  # float64 (T,), in nats: minus the log of the probability that it was given
    rank: np.ndarray  # int64 (T,): how many tokens were found likelier, and one
    entropy: np.ndarray  # float64 (T,), in nats: how open the choice was
    likeliest: np.ndarray  # int64 (T, 3): the tokens found the likeliest, the first of them first
    probability: np.ndarray  # float64 (T, 3): theirs


def predictions(inside: Inside, most: int = 3) -> Predictions:
    """What the model foresaw of a text.

    Args:
        most: how many of the likeliest tokens are kept.
    """
    logs = log_softmax(inside.logits[:-1])
    own = at(logs, np.array(inside.ids[1:], int))
    best = np.argsort(-logs, -1, kind="stable")[:, :most]
    best_logs = np.take_along_axis(logs, best, -1)
    return Predictions(
        inside.ids,
        _behind(-own, np.nan),
        _behind(1 + (logs > own[:, None]).sum(-1), 0),
        _behind(-(np.exp(logs) * logs).sum(-1), np.nan),
        _behind(best, 0),
        _behind(np.exp(best_logs), np.nan),
    )


def _behind(rows: np.ndarray, first: float) -> np.ndarray:
    """The rows behind one more, which stands for the first token."""
    return np.concatenate([np.full((1, *rows.shape[1:]), first, rows.dtype), rows])
