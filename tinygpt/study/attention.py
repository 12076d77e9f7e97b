"""Where each head reads: its attention, what kind of reading that is, and what passes through.

Attention is where a head reads, not what matters: `heads` measures that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.config import GPTConfig
from tinygpt.errors import InputError
from tinygpt.layers import Record
from tinygpt.model import GPT
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import capture
from tinygpt.study.inside import at, check_numbers, log_softmax

CAUTION = "attention is where a head reads, not what matters: `study heads` measures that"


def entropies(attention: np.ndarray) -> np.ndarray:
    """How widely each head reads: 0 for one token at a time, 1 for all that it may see alike.

    Args:
        attention: float32 (L, H, T, T), T at least 2.
    Returns:
        float64 (L, H): the mean over the tokens i from the second of the entropy of their weights
        over log(i + 1), i counted from 0.
    """
    weights = attention.astype(np.float64)
    logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    entropy = -(weights * logs).sum(-1)[..., 1:]
    return (entropy / np.log(np.arange(2, weights.shape[-1] + 1))).mean(-1)


def rollout(attention: np.ndarray) -> np.ndarray:
    """How much of each token reaches every place through all blocks, shortcuts counted as a half.

    Args:
        attention: float32 (L, H, T, T).
    Returns:
        float64 (L, T, T): after each block.
    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    found, reached = [], np.eye(attention.shape[-1])
    for weights in attention.astype(np.float64):
        reached = (weights.mean(0) + np.eye(len(reached))) / 2 @ reached
        found.append(reached)
    return np.stack(found)


def no_halves(config: GPTConfig) -> str | None:
    """Why the shortcuts of such a model cannot be counted as a half; None where they can."""
    if not config.shortcut:
        return "this model has none"
    return "DeepNorm makes this model's larger" if config.norm == "deep" else None


@dataclass(frozen=True)
class HeadScores:
    """What kind of reading each of H heads in L blocks does, on random tokens given twice.

    All of (L, H), float64: the mean share of its attention that a token of the second copy gives.
    """

    previous: np.ndarray  # to the token before it
    first: np.ndarray  # to the first token of all
    duplicate: np.ndarray  # to itself in the first copy
    induction: np.ndarray  # to what followed it in the first copy
    chance: float  # what a head gives any token that reads all alike
    gain: float  # loss of the first copy less that of the second, in nats a token


def head_scores(model: GPT, draws: int = 8, seed: int = 0) -> HeadScores:
    """Score the heads on n distinct random tokens, given twice.

    n is 64, or what half of the window or the vocabulary holds.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    n = min(64, model.config.block_size // 2, model.config.vocab_size)
    if n < 2:
        raise InputError(f"the window holds {model.config.block_size} tokens: it needs 4 at least")

    def passed(ids: Tensor) -> list[Tensor]:
        record = Record()
        found = [model(ids, record=record), *record.attention_weights]
        Tensor.realize(*found)
        return found

    step = capture(passed, get_state_dict(model), ("scored", model, HeadScores))
    rng, kinds, gain = np.random.default_rng(seed), [], 0.0
    for _ in range(draws):
        once = rng.choice(model.config.vocab_size, n, replace=False)
        ids = np.tile(once, 2)
        logits, *read = step(buffers.tensor(ids[None].astype(np.int32)))
        weights = [buffers.read(each).reshape(-1, len(ids), len(ids)) for each in read]
        kinds.append(_shares(np.stack(weights), n))
        found = buffers.read(logits).reshape(len(ids), -1)
        check_numbers(model, found)
        gain += _gain(found, ids, n) / draws
    places = np.arange(n, 2 * n)
    return HeadScores(*np.mean(kinds, 0), float((1 / (places + 1)).mean()), gain)


def _shares(attention: np.ndarray, n: int) -> list[np.ndarray]:
    """(L, H, 2 n, 2 n) -> what the second copy gives to the four kinds of places, each (L, H)."""
    i = np.arange(n, 2 * n)
    seen = (i - 1, np.zeros(n, int), i - n, i - n + 1)
    return [attention[:, :, i, j].astype(np.float64).mean(-1) for j in seen]


def _gain(logits: np.ndarray, ids: np.ndarray, n: int) -> float:
    loss = -at(log_softmax(logits[:-1]), ids[1:])
    return float(loss[: n - 1].mean() - loss[n:].mean())
