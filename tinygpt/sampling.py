"""From logits to the next token: plain functions that compose, all of them on the device.

`logits` is float (B, V) throughout, and a token ruled out has logit -inf. A filter's bound is a
tensor, float or int (1,), so that another value needs no other kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from tinygpt.errors import InputError, unknown
from tinygpt.ops import threshold


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Frozen; a value that cannot work raises InputError.

    The filters apply in this order, each to what the one before has left: repetition, frequency
    and presence penalties, temperature, top_k, top_p, min_p.
    """

    temperature: float = 1.0  # 0 is greedy: always the likeliest token
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        self._check("temperature", lambda x: 0 <= x < math.inf, "0 (greedy) or more")
        self._check("top_k", lambda x: isinstance(x, int) and x >= 1, "a whole number, 1 or more")
        self._check("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._check("min_p", lambda x: 0 <= x <= 1, "between 0 and 1")
        self._check("repetition_penalty", lambda x: 0 < x < math.inf, "above 0 (1 is none)")
        for name in ("frequency_penalty", "presence_penalty"):
            self._check(name, math.isfinite, "a finite number (0 is none)")

    def _check(self, name, allowed, words) -> None:
        value = getattr(self, name)
        if value is None and name in ("top_k", "top_p", "min_p"):
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not allowed(value):
            raise InputError(f"{name} is {value!r}: it must be {words}")

    @classmethod
    def of(cls, **settings: Any) -> Sampling:
        """Sampling(**settings), where a name that does not exist is an InputError too."""
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("sampling setting", name, names)
        return cls(**settings)

    @property
    def greedy(self) -> bool:
        """Whether the choice is the likeliest token, so that nothing is drawn."""
        return self.temperature == 0

    @property
    def active(self) -> tuple[str, ...]:
        """The settings that change anything, in the order in which they apply."""
        neutral = {field.name: field.default for field in fields(self)}
        neutral["top_p"] = 1 if self.top_p == 1 else None
        names = ["repetition_penalty", "frequency_penalty", "presence_penalty"]
        if not self.greedy:  # no filter changes which token is the likeliest
            names += ["temperature", "top_k", "top_p", "min_p"]
        return tuple(name for name in names if getattr(self, name) != neutral[name])

    @property
    def needs_counts(self) -> bool:
        """Whether the penalties need to know what came before."""
        return any(name.endswith("penalty") for name in self.active)

    def bounds(self) -> dict[str, np.ndarray]:
        """The active settings, each of shape (1,) and as a tensor what `choose` takes."""
        types = {"top_k": np.int32}
        return {x: np.array([getattr(self, x)], types.get(x, np.float32)) for x in self.active}


def choose(
    logits: Tensor,
    bounds: dict[str, Tensor],
    seeds: Tensor | None = None,
    step: int | UOp = 0,
    counts: Tensor | None = None,
) -> Tensor:
    """The next token of each row.

    Args:
        logits: float (B, V).
        bounds: the settings to apply: see `Sampling.bounds`.
        seeds: uint64 (B,), one for each row's own stream of draws; None is greedy.
        step: which draw of the stream this is.
        counts: float (2, B, V): how often each token stands in prompt and text; in the text alone.
    Returns:
        int32 (B,).
    """
    for name, bound in bounds.items():
        if name.endswith("penalty"):
            logits = PENALTIES[name](logits, counts, bound)
        else:
            logits = FILTERS[name](logits, bound)
        logits = logits.contiguous()
    if seeds is not None:
        logits = logits + gumbel(seeds, step, logits.shape[-1])
    return logits.contiguous().argmax(-1).cast(dtypes.int32)


def repetition_penalty(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Tokens seen in prompt or text made less likely: positive logits divided, others multiplied.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the form of transformers'
    RepetitionPenaltyLogitsProcessor, which also holds for negative logits.
    """
    penalized = (logits > 0).where(logits / penalty, logits * penalty)
    return (counts[0] > 0).where(penalized, logits)


def frequency_penalty(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Each logit lowered by the penalty times how often its token stands in the text made so far.

    Source: OpenAI API reference, "frequency and presence penalties".
    """
    return logits - counts[1] * penalty


def presence_penalty(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Each logit lowered by the penalty if its token stands in the text made so far (see above)."""
    return logits - (counts[1] > 0) * penalty


def temperature(logits: Tensor, value: Tensor) -> Tensor:
    """Logits divided by the temperature: below 1 sharpens the distribution, above flattens it."""
    return logits / value


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """The k likeliest tokens kept, and those that tie with the last. Source: Fan et al. 2018."""
    order = _ordered_bits(logits)
    return (order >= threshold(order, Tensor.ones_like(logits), k)).where(logits, -math.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """The fewest likeliest tokens whose probabilities reach p kept, and ties with the last.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    probabilities = logits.softmax(-1).contiguous()
    order = _ordered_bits(probabilities)
    return (order >= threshold(order, probabilities, p)).where(logits, -math.inf)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Tokens at least p times as likely as the likeliest kept. Source: Nguyen et al. 2024."""
    return (logits >= logits.max(-1, keepdim=True) + p.log()).where(logits, -math.inf)


PENALTIES = {f.__name__: f for f in (repetition_penalty, frequency_penalty, presence_penalty)}
FILTERS = {f.__name__: f for f in (temperature, top_k, top_p, min_p)}


def gumbel(seeds: Tensor, step: int | UOp, size: int) -> Tensor:
    """Gumbel noise: the argmax of logits plus it is a draw from their softmax.

    The generator is tinygrad's Threefry, a pure function of (seed, step, place): a row draws the
    same whatever stands beside it. Source: Maddison et al. 2014, "A* Sampling", section 2.

    Args:
        seeds: uint64 (B,).
        step: int, from 0.
    Returns:
        float32 (B, size).
    """
    places = Tensor.arange((size + 1) // 2, dtype=dtypes.uint32).cast(dtypes.uint64)
    counter = places + (Tensor.zeros(1, dtype=dtypes.uint64) + step) * 2**32
    pairs = counter.reshape(1, -1).threefry(seeds.reshape(-1, 1))  # (B, size / 2) of 64 bits
    bits = Tensor.cat((pairs & 0xFFFFFFFF), pairs.rshift(32), dim=-1)[:, :size]
    # 24 bits, the middle of 2**24 equal steps: never 0 or 1, where the logarithms end
    uniform = (bits.cast(dtypes.uint32).rshift(8).cast(dtypes.float32) + 0.5) * 2**-24
    return -(-uniform.log()).log()


def _ordered_bits(x: Tensor) -> Tensor:
    """float32 -> uint32 in the same order, so that thresholds can be searched bit by bit."""
    bits = x.cast(dtypes.float32).bitcast(dtypes.uint32)
    return (bits >= 2**31).where(bits ^ 0xFFFFFFFF, bits | 0x80000000).contiguous()
