"""How copying is learnt: a model of attention alone, trained on sequences that repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor

from tinygpt.config import GPTConfig
from tinygpt.model import GPT
from tinygpt.study.attention import HeadScores, head_scores
from tinygpt.study.heads import LeftOut, leave_out
from tinygpt.training.settings import TrainConfig
from tinygpt.training.step import Trainer

_IDS, _LENGTH = 64, 64
_PERIODS = 6, 32  # the shortest and the longest
# What is measured is two copies of 32 tokens, so that each token of the second has been seen.
# The output projection is one of its own: with a tied one, copying was not learnt in 600 steps.
_CONFIG = GPTConfig(2, 4, 64, _LENGTH, _IDS, bias=False, tie_word_embeddings=False)


@dataclass(frozen=True)
class Induction:
    """A training run, measured E times: when copying is learnt, and by which heads."""

    steps: list[int]  # E of them
    first: np.ndarray  # float64 (E,), in nats: the loss of the first copy
    second: np.ndarray  # float64 (E,): of the second, which could be copied
    scores: list[HeadScores]  # E of them, each of (2, 4)
    left_out: LeftOut  # at the end, on repeated sequences

    @property
    def found(self) -> bool:
        """Whether a head of the second block is on the diagonal that copying has."""
        return bool(self.scores[-1].induction[1].max() > 0.4)


class _Nothing:
    """A feed-forward that is left out: what comes in goes on."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, *_: Any) -> Tensor:
        return x if residual is None else residual


class _Same:
    """A layer norm that is left out."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


def attention_only(config: GPTConfig, seed: int) -> GPT:
    """A new model without feed-forwards and the norms before them."""
    model = GPT(config, seed)
    for block in model.blocks:
        block.mlp, block.ln_2 = _Nothing(), _Same()  # type: ignore[assignment]
    return model


def learn_induction(
    steps: int = 750,
    seed: int = 0,
    every: int = 25,
    tell: Callable[[int, float, float], None] = lambda *_: None,
) -> Induction:
    """Train such a model, and measure it on the way.

    Args:
        steps: of 32 sequences of 64 ids of 64, which repeat after a random period of 6 to 32.
        every: how many steps lie between two measurements.
        tell: is told of each measurement: the step, the loss of the first copy and of the second.
    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    model, rng = attention_only(_CONFIG, seed), np.random.default_rng(seed)
    settings = TrainConfig(
        batch_size=32, block_size=_LENGTH, steps=steps, learning_rate=3e-3, schedule="constant",
        warmup_steps=0, weight_decay=0.0, seed=seed,
    )  # fmt: skip
    trainer = Trainer(model, settings)
    test = repeated(np.random.default_rng(seed + 1), 64, 32)
    found: list[tuple[int, float, float, HeadScores]] = []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            losses = model.losses(test[:, :-1], test[:, 1:]).numpy().mean(0, dtype=np.float64)
            first, second = float(losses[:31].mean()), float(losses[32:].mean())
            found.append((step, first, second, head_scores(model, draws=2)))
            tell(step, first, second)
        if step < steps:
            batch = repeated(rng, 32)
            trainer.step([(batch[:, :-1].copy(), batch[:, 1:].copy())])
    at, first, second, scores = (list(each) for each in zip(*found, strict=True))
    out = leave_out(model, test[:8])
    return Induction(at, np.array(first), np.array(second), scores, out)


def repeated(rng: np.random.Generator, count: int, period: int | None = None) -> np.ndarray:
    """Sequences that repeat themselves, int32 (count, 65).

    Args:
        period: after so many tokens; None draws one for each.
    """
    found = np.empty((count, _LENGTH + 1), np.int32)
    for row in found:
        length = period or int(rng.integers(_PERIODS[0], _PERIODS[1], endpoint=True))
        row[:] = np.resize(rng.integers(0, _IDS, length), _LENGTH + 1)
    return found
