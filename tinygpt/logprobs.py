"""What a token cost, and which others might have come, of the logits before it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Likely(NamedTuple):
    """One token that might have come."""

    token: int
    logprob: float  # of the raw softmax of the model's logits, in nats
    kept: float  # its probability once all settings were applied; 0 where they rule it out


class Token(NamedTuple):
    """What a step gives of one slot."""

    token: int  # -1 or the vocabulary's size where the logits were no finite numbers
    logprob: float | None = None  # as in `Likely`; None unless it was asked for
    top: tuple[Likely, ...] = ()  # the likeliest before the settings, from the likeliest down
    prompt: tuple[Token, ...] = ()  # of the first token alone, where asked for: see `Slots.start`


def scored(token: int, logits: np.ndarray, kept: np.ndarray | None, top: int) -> Token:
    """A token with its log-probability, and the likeliest that might have come.

    Args:
        logits: float32 (V,), the model's own.
        kept: float32 (V,), what the settings have left of them; None: all.
    """
    logprobs = _log_softmax(logits)
    after = np.exp(logprobs if kept is None else _log_softmax(kept))
    top = min(top, len(logprobs))
    best = np.argpartition(-logprobs, max(top - 1, 0))[:top].tolist()
    order = sorted(best, key=lambda i: (-logprobs[i], i))
    likely = tuple(Likely(i, float(logprobs[i]), float(after[i])) for i in order)
    return Token(token, float(logprobs[token]), likely)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    """float (V,) -> float64 (V,)."""
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())
