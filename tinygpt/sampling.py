"""From logits to the next token: plain functions that compose, all of them on the device.

`logits` is float (B, V) throughout, and a token ruled out has logit -inf. What a step of the way
compares with, its bound, is a tensor, float or int (B, 1), so that each row has its own and another
value needs no other kernel. A new step is a function here, and a field of `Sampling` that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt.ops import gumbel, threshold
from tinygpt.ops.sizes import shape
from tinygpt.options import Checked, check_names, kinds, option


def logit_bias(logits: Tensor, bias: Tensor) -> Tensor:
    """The logits with something added to each token's; the bias is float (B, V)."""
    return logits + bias


def repetition_penalty(logits: Tensor, penalty: Tensor, counts: Tensor) -> Tensor:
    """Tokens seen in prompt or text made less likely: positive logits divided, others multiplied.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the form of transformers'
    RepetitionPenaltyLogitsProcessor, which also holds for negative logits.
    """
    penalized = (logits > 0).where(logits / penalty, logits * penalty)
    return (counts[0] > 0).where(penalized, logits)


def frequency_penalty(logits: Tensor, penalty: Tensor, counts: Tensor) -> Tensor:
    """Each logit lowered by the penalty times how often its token stands in the text made so far.

    Source: OpenAI API reference, "frequency and presence penalties".
    """
    return logits - counts[1] * penalty


def presence_penalty(logits: Tensor, penalty: Tensor, counts: Tensor) -> Tensor:
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


class Step(NamedTuple):
    """One step from the logits to the choice: what `steps_of` gives and `apply` takes."""

    function: Callable[..., Tensor]  # (logits, bound) -> logits, or (logits, bound, counts)
    bound: Any  # (B, 1): an array from `steps_of`, a tensor for `apply`
    counted: bool  # whether the function wants to know what came before

    @property
    def name(self) -> str:
        """The function's name, which is that of the setting."""
        return self.function.__name__


def _step(default: Any, function: Callable[..., Tensor], help: str, **more: Any) -> Any:
    """A setting that is a step.

    Args:
        function: what the step does.
        more: `counted` for a function that takes the counts; `neutral`, a value besides the default
            that changes nothing; `idle`, a bound that changes nothing, where the default is none;
            and what `option` takes.
    """
    return option(default, help, function=function, **{"counted": False, **more})


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How to choose the next token. Frozen; a value that cannot work raises InputError.

    The steps apply in the order of the fields, each to what the one before has left.
    """

    repetition_penalty: float = _step(
        1.0,
        repetition_penalty,
        "above 1 against what is in prompt or text",
        counted=True,
        limits={"above": 0},
    )
    frequency_penalty: float = _step(
        0.0, frequency_penalty, "against a token each time it is in the text", counted=True
    )
    presence_penalty: float = _step(
        0.0, presence_penalty, "against a token that is in the text at all", counted=True
    )
    temperature: float = _step(
        1.0,
        temperature,
        "below 1 less daring, above 1 more; 0 takes the likeliest",
        short=("-t",),
        limits={"low": 0},
    )
    top_k: int | None = _step(
        None, top_k, "only the N likeliest tokens", idle=2**31 - 1, limits={"low": 1}
    )
    top_p: float | None = _step(
        None,
        top_p,
        "only the likeliest that together reach X",
        neutral=1,
        idle=2,  # more than probabilities reach, however they are rounded
        limits={"above": 0, "most": 1},
    )
    min_p: float | None = _step(
        None,
        min_p,
        "only those at least X times as likely as the likeliest",
        neutral=0,
        idle=0,
        limits={"low": 0, "most": 1},
    )

    @classmethod
    def of(cls, **settings: Any) -> Sampling:
        """`Sampling(**settings)`, where a name that does not exist is an InputError too."""
        check_names(cls, settings, "sampling setting")
        return cls(**settings)

    @property
    def greedy(self) -> bool:
        """Whether the choice is the likeliest token, so that nothing is drawn."""
        return self.temperature == 0

    def needs(self, field: Field) -> bool:
        """Whether the step of a field would change anything.

        For a greedy choice only those do that count what came before: no other changes which token
        is the likeliest.
        """
        value, about = getattr(self, field.name), field.metadata
        neutral = value in (field.default, about.get("neutral"))
        return not neutral and (about["counted"] or not self.greedy)


def steps_of(rows: Sequence[Sampling], every: bool = False) -> list[Step]:
    """The steps that change anything in any of the rows, in their order, with arrays (B, 1).

    Args:
        every: take the others too, so that all settings have the same.
    """
    found, known = [], kinds(type(rows[0]))
    for field in fields(rows[0]):
        needed = [row.needs(field) for row in rows]
        if every or any(needed):
            about, kind = field.metadata, known[field.name].type
            idle = about.get("idle", field.default)
            bounds = [
                _bound(getattr(row, field.name), kind) if its else idle
                for row, its in zip(rows, needed, strict=True)
            ]
            values = np.array(bounds, np.int32 if kind is int else np.float32).reshape(-1, 1)
            found.append(Step(about["function"], values, about["counted"]))
    return found


# The least and the largest that a float setting counts as. Beyond them float32 would overflow, or
# have only zero; no logit is so large or so small that a choice could tell.
_LEAST, _LARGEST = 1e-15, 1e15


def _bound(value: Any, kind: type) -> float:
    """A setting within what float32 and int32 can say."""
    if kind is int:
        return min(value, 2**31 - 1)
    size = min(max(abs(value), _LEAST), _LARGEST)
    return size if value > 0 else -size


def apply(logits: Tensor, steps: Sequence[Step], counts: Tensor | None = None) -> Tensor:
    """The logits (B, V) once each step was applied, in this order.

    Args:
        steps: see `steps_of`. Bounds are tensors, (B, 1), or (1,) for all rows.
        counts: float (2, B, V): how often each token stands in prompt and text; in the text alone.
    """
    for step in steps:
        arguments = (step.bound, counts) if step.counted else (step.bound,)
        logits = step.function(logits, *arguments).contiguous()
    return logits


def pick(
    given: Tensor,
    kept: Tensor,
    seeds: Tensor | None = None,
    draw: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """The likeliest token of each row, or one that is drawn.

    Args:
        given: float (B, V), the model's logits.
        kept: float (B, V), what the steps have left of them.
        seeds: uint64 (B,), one for each row's own stream of draws; None: nothing is drawn.
        draw: which draw of its stream each row takes, int32 (B,); None: the first.
        drawn: float (B, 1): 1 for a row that draws, 0 for one that takes the likeliest; None: all
            draw.
    Returns:
        int32 (B,), which is no id where a logit was no finite number: -1 or V.
    """
    V = shape(given)[-1]
    if seeds is not None:
        if draw is None:
            draw = Tensor.zeros(shape(seeds)[0], dtype=dtypes.int32).contiguous()
        noise = gumbel(seeds, draw, V)
        kept = kept + (noise if drawn is None else noise * drawn)
    kept = kept.contiguous()
    # The first of the largest, as argmax has it. What is no number decides against all, in the same
    # kernel: filters may have hidden it, and a maximum may not see it. It is known by its exponent,
    # all ones: what comparing it says is not the same on every backend.
    places = (kept == kept.max(-1, keepdim=True)) * Tensor.arange(V, 0, -1, dtype=dtypes.int32)
    exponents = given.cast(dtypes.float32).bitcast(dtypes.uint32) & 0x7F800000
    return V - (exponents != 0x7F800000).where(places, V + 1).max(-1).cast(dtypes.int32)


def _ordered_bits(x: Tensor) -> Tensor:
    """float32 -> uint32 in the same order, so that thresholds can be searched bit by bit."""
    bits = x.cast(dtypes.float32).bitcast(dtypes.uint32)
    negative = bits > 2**31  # which is -0.0, no less than 0.0
    return negative.where(bits ^ 0xFFFFFFFF, bits | 0x80000000).contiguous()
