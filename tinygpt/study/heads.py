"""Which heads matter: what the loss becomes when one is left out."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.errors import InputError
from tinygpt.layers import Linear
from tinygpt.model import GPT
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import capture


@dataclass(frozen=True)
class LeftOut:
    """The loss without each of H heads in L blocks, in nats a token."""

    loss: float  # of the whole model
    without: np.ndarray  # float64 (L, H): how much higher it is when the head's output is zero
    error: np.ndarray  # float64 (L, H): the standard error of that, over the windows

    @property
    def matters(self) -> np.ndarray:
        """bool (L, H): whether the difference is more than two of its standard errors."""
        return np.abs(self.without) > 2 * self.error


class _Scaled:
    """An output projection, before which each head's output is multiplied with a number."""

    def __init__(self, linear: Linear, factors: Tensor) -> None:
        self.linear, self.factors = linear, factors  # float32 (H,)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.factors.shape[0], -1) * self.factors.unsqueeze(-1)
        return self.linear(parts.reshape(x.shape).contiguous(), residual)


def with_heads(model: GPT, factors: Tensor | Sequence[Tensor]) -> GPT:
    """The same model, of the same weights, in which each head's output is multiplied.

    Args:
        factors: float32 (L, H), or (H,) for each block; 0 leaves a head out.
    """
    twin = copy(model)
    twin.blocks = []
    for i, block in enumerate(model.blocks):
        changed = copy(block)
        changed.attn = copy(block.attn)
        changed.attn.out_proj = _Scaled(block.attn.out_proj, factors[i])
        twin.blocks.append(changed)
    return twin


def leave_out(model: GPT, windows: np.ndarray) -> LeftOut:
    """Measure the loss with all heads, and without each of them in turn.

    Args:
        windows: int (W, T + 1): texts, of which all tokens but the first are predicted; at least 2.
    """
    if len(windows) < 2:
        raise InputError(f"there are {len(windows)} windows: a standard error needs 2 at least")
    shape = model.config.n_layer, model.config.n_head
    inputs = buffers.tensor(windows[:, :-1].astype(np.int32))
    targets = buffers.tensor(windows[:, 1:].astype(np.int32))

    def losses(factors: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return with_heads(model, factors).losses(inputs, targets).realize()

    step = capture(losses, get_state_dict(model), ("left out", model, LeftOut))

    def measured(factors: np.ndarray) -> np.ndarray:
        found = step(buffers.tensor(factors), inputs, targets)
        return buffers.read(found).reshape(windows[:, 1:].shape).astype(np.float64).mean(-1)

    whole = measured(np.ones(shape, np.float32))
    without, error = np.empty(shape), np.empty(shape)
    for place in np.ndindex(shape):
        factors = np.ones(shape, np.float32)
        factors[place] = 0
        difference = measured(factors) - whole
        without[place] = difference.mean()
        error[place] = difference.std(ddof=1) / np.sqrt(len(difference))
    return LeftOut(float(whole.mean()), without, error)
