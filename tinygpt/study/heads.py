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
    without: np.ndarray  # float64 (L, H): how much higher it is when the head is left out
    error: np.ndarray  # float64 (L, H): the standard error of that, over the windows

    @property
    def matters(self) -> np.ndarray:
        """bool (L, H): whether the difference is more than two of its standard errors."""
        return np.abs(self.without) > 2 * self.error


class _Masked:
    """An output projection, before which some heads' outputs are zero, or their mean."""

    def __init__(self, linear: Linear, mask: Tensor, mean: bool) -> None:
        self.linear, self.mask, self.mean = linear, mask.unsqueeze(-1), mean  # float32 (H, 1)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        heads = x.reshape(*x.shape[:-1], self.mask.shape[0], -1)
        kept = heads * self.mask
        if self.mean:  # of all tokens of all texts
            kept = kept + heads.mean((0, 1)) * (1 - self.mask)
        return self.linear(kept.reshape(x.shape).contiguous(), residual)


def with_heads(model: GPT, mask: Tensor | Sequence[Tensor], mean: bool = False) -> GPT:
    """The same model, of the same weights, without some of its heads.

    Args:
        mask: float32 (L, H), or (H,) for each block: 1 keeps a head, 0 leaves it out.
        mean: put the mean of a head's outputs in their place, over all tokens that are given,
            so that it still adds what it always adds; otherwise zero.
    """
    twin = copy(model)
    twin.blocks = []
    for i, block in enumerate(model.blocks):
        changed = copy(block)
        changed.attn = copy(block.attn)
        changed.attn.out_proj = _Masked(block.attn.out_proj, mask[i], mean)
        twin.blocks.append(changed)
    return twin


def leave_out(model: GPT, windows: np.ndarray, mean: bool = False) -> LeftOut:
    """Measure the loss with all heads, and without each of them in turn.

    Args:
        windows: int (W, T + 1): texts, of which all tokens but the first are predicted; at least 2.
        mean: what stands in a head's place: see `with_heads`.
    """
    if len(windows) < 2:
        raise InputError(f"there are {len(windows)} windows: a standard error needs 2 at least")
    shape = model.config.n_layer, model.config.n_head
    inputs = buffers.tensor(windows[:, :-1].astype(np.int32))
    targets = buffers.tensor(windows[:, 1:].astype(np.int32))

    def losses(mask: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return with_heads(model, mask, mean).losses(inputs, targets).realize()

    step = capture(losses, get_state_dict(model), ("left out", mean, model, LeftOut))

    def measured(mask: np.ndarray) -> np.ndarray:
        found = step(buffers.tensor(mask), inputs, targets)
        return buffers.read(found).reshape(windows[:, 1:].shape).astype(np.float64).mean(-1)

    whole = measured(np.ones(shape, np.float32))
    without, error = np.empty(shape), np.empty(shape)
    for place in np.ndindex(shape):
        mask = np.ones(shape, np.float32)
        mask[place] = 0
        difference = measured(mask) - whole
        without[place] = difference.mean()
        error[place] = difference.std(ddof=1) / np.sqrt(len(difference))
    return LeftOut(float(whole.mean()), without, error)
