"""From gradients to new weights: AdamW, Muon, clipping and the learning rate's course.

All of it is graph: nothing here computes until a caller realises it. What changes from step to step
enters through one small tensor (`Optimizer.numbers`), so that a JIT captures the step once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from tinygrad import Tensor

from tinygpt.ops import fused
from tinygpt.ops.fast import fast, matmul

_EPSILON = 1e-8  # AdamW's
_MOMENTUM = 0.95  # Muon's
# Muon's polynomial, whose five-fold application brings singular values near 1.
_NEWTON_SCHULZ, _NEWTON_SCHULZ_STEPS = (3.4445, -4.775, 2.0315), 5


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


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The length of all gradients as one vector, a scalar."""
    if fast(*gradients.values()):
        return fused.squares(list(gradients.values())).sqrt()
    squares = [gradient.square().sum() for gradient in gradients.values()]
    return Tensor.stack(*squares).sum().sqrt()


class Optimizer:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay is for matrices (embeddings are such) only. `state` names every tensor that must be
    kept to go on later, apart from the parameters; a test compares both rules with PyTorch's.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Jordan
    et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        kind: Literal["adamw", "muon"] = "adamw",
        beta1: float = 0.9,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        grad_clip: float = 0.0,
    ) -> None:
        """
        Args:
            parameters: what to update, by name; they are updated in place.
            grad_clip: longest length of all gradients as one vector; 0 does not clip.
        """
        self.parameters = dict(parameters)
        self.beta1, self.beta2 = beta1, beta2
        self.weight_decay, self.grad_clip = weight_decay, grad_clip
        self.by_muon = {
            name
            for name, parameter in self.parameters.items()
            if kind == "muon" and parameter.ndim == 2 and name.startswith("blocks.")
        }
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for moment in ("momentum",) if name in self.by_muon else ("mean", "square"):
                zeros = Tensor.zeros(*parameter.shape, device=parameter.device).contiguous()
                self.state[f"{name}.{moment}"] = zeros
        Tensor.realize(*self.state.values())

    def numbers(self, rate: float, muon_rate: float, update: int) -> np.ndarray:
        """What `updates` needs to know of one step: float32 (4,).

        Args:
            rate, muon_rate: the learning rates for AdamW and for Muon.
            update: how many updates were made with this one, from 1.
        """
        first, second = (1 - beta**update for beta in (self.beta1, self.beta2))
        return np.array([rate, rate / first, math.sqrt(second), muon_rate], np.float32)

    def updates(
        self, gradients: Mapping[str, Tensor], norm: Tensor, numbers: Tensor, good: Tensor
    ) -> list[Tensor]:
        """Assign new values to parameters and state, and give the tensors to be realised for it.

        Args:
            gradients: by the parameters' names.
            norm: their `global_norm`.
            numbers: from the method of that name, realised.
            good: bool scalar; where it is false everything keeps its value.
        """
        rate, adam_rate, root, muon_rate = (numbers[i] for i in range(4))
        clip = (self.grad_clip / (norm + 1e-6)).minimum(1.0) if self.grad_clip else norm * 0 + 1
        if not self.by_muon and fast(*self.parameters.values()):
            return self._fused_updates(gradients, numbers, clip, good)
        clip, written = clip.contiguous(), []
        for name, parameter in self.parameters.items():
            decay = self.weight_decay if parameter.ndim == 2 else 0.0
            gradient = gradients[name] * clip
            if name in self.by_muon:
                momentum = self._keep(f"{name}.momentum", _MOMENTUM, 1 - _MOMENTUM, gradient, good)
                direction = orthogonal(gradient * (1 - _MOMENTUM) + momentum * _MOMENTUM)
                step = muon_rate * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                kept = 1 - muon_rate * decay
            else:
                mean = self._keep(f"{name}.mean", self.beta1, 1 - self.beta1, gradient, good)
                squares = gradient * gradient
                square = self._keep(f"{name}.square", self.beta2, 1 - self.beta2, squares, good)
                direction = mean / (square.sqrt() / root + _EPSILON)
                step, kept = adam_rate, 1 - rate * decay
            old = parameter.detach()
            parameter.assign(good.where(old * kept - step * direction, old))
            written.append(parameter)
        return [*written, *self.state.values()]

    def _fused_updates(self, gradients, numbers, clip, good) -> list[Tensor]:
        names = list(self.parameters)
        decays = [self.weight_decay * (self.parameters[name].ndim == 2) for name in names]
        return fused.adamw(
            list(self.parameters.values()),
            [gradients[name] for name in names],
            [self.state[f"{name}.mean"] for name in names],
            [self.state[f"{name}.square"] for name in names],
            decays,
            (self.beta1, self.beta2),
            Tensor.cat(numbers[:3], Tensor.stack(clip, good.float())),
        )

    def _keep(self, name: str, old: float, new: float, value: Tensor, good: Tensor) -> Tensor:
        """Move a running average towards a value."""
        average = self.state[name]
        return average.assign(good.where(old * average + new * value, average))


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1, by Newton and Schulz's iteration.

    Args:
        matrix: float32 (M, N).
    Source: Jordan et al. 2024, `zeropower_via_newtonschulz5`.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.transpose() if tall else matrix).contiguous()
    x = (x / (x.square().sum().sqrt() + 1e-7)).contiguous()
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = matmul(x, x, b_transposed=True)
        mixed = (b * gram + c * matmul(gram, gram)).contiguous()
        x = (a * x + matmul(mixed, x)).contiguous()
    return x.transpose() if tall else x
