"""From gradients to new weights: AdamW, Muon, clipping and the learning rate's course.

All of it is graph: nothing here computes until a caller realises it. What changes from step to step
enters through one small tensor (`StepInputs`), so that a JIT captures the step once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from tinygrad import Tensor

from tinygpt import ops
from tinygpt.runtime import thread_pool

_MOMENTUM = 0.95  # Muon's
# Muon's polynomial, whose five-fold application brings singular values near 1.
_NEWTON_SCHULZ, _NEWTON_SCHULZ_STEPS = (3.4445, -4.775, 2.0315), 5


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The length of all gradients as one vector, a scalar."""
    return ops.sum_of_squares(list(gradients.values())).sqrt()


class StepInputs(NamedTuple):
    """What changes from step to step: on its way into a captured graph as one tensor, and as
    scalars within it."""

    rate: float | Tensor  # AdamW's
    adam_rate: float | Tensor  # that over the correction of the first mean
    root: float | Tensor  # of the correction of the second
    muon_rate: float | Tensor
    loss_scale: float | Tensor  # see `training.step`

    def array(self) -> np.ndarray:
        """float32 (5,)."""
        return np.array(self, np.float32)

    @classmethod
    def of(cls, tensor: Tensor) -> StepInputs:
        """The scalars that stand in such a tensor."""
        return cls(*(tensor[i] for i in range(len(cls._fields))))


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
        self.betas = beta1, beta2
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
        with thread_pool.building:  # another thread may be compiling
            Tensor.realize(*self.state.values())

    def inputs(
        self, rate: float, muon_rate: float, update: int, loss_scale: float = 1.0
    ) -> StepInputs:
        """What `updates` needs to know of one step.

        Args:
            rate, muon_rate: the learning rates for AdamW and for Muon.
            update: how many updates were made with this one, from 1.
        """
        first, second = (1 - beta**update for beta in self.betas)
        return StepInputs(rate, rate / first, math.sqrt(second), muon_rate, loss_scale)

    def updates(
        self, gradients: Mapping[str, Tensor], norm: Tensor, inputs: StepInputs, good: Tensor
    ) -> list[Tensor]:
        """Assign new values to parameters and state, and give the tensors to be realised for it.

        Args:
            gradients: by the parameters' names.
            norm: their `global_norm`.
            inputs: as scalars.
            good: bool scalar; where it is false everything keeps its value.
        """
        clip = (self.grad_clip / (norm + 1e-6)).minimum(1.0) if self.grad_clip else norm * 0 + 1
        clip = clip.contiguous()
        for_adamw = (inputs.rate, inputs.adam_rate, inputs.root, clip, good.float())
        adamw_inputs = Tensor.stack(*for_adamw).contiguous()
        for name, parameter in self.parameters.items():
            decay = self.weight_decay if parameter.ndim == 2 else 0.0
            if name in self.by_muon:
                self._move_by_muon(name, gradients[name] * clip, inputs.muon_rate, decay, good)
                continue
            means = self.state[f"{name}.mean"], self.state[f"{name}.square"]
            ops.adamw(parameter, *means, gradients[name], adamw_inputs, decay, self.betas)
        return [*self.parameters.values(), *self.state.values()]

    def _move_by_muon(
        self, name: str, gradient: Tensor, rate: float | Tensor, decay: float, good: Tensor
    ) -> None:
        """Source: Jordan et al. 2024, with Nesterov's momentum."""
        parameter, average = self.parameters[name], self.state[f"{name}.momentum"]
        new = average * _MOMENTUM + gradient * (1 - _MOMENTUM)
        momentum = average.assign(good.where(new, average))
        direction = orthogonal(gradient * (1 - _MOMENTUM) + momentum * _MOMENTUM)
        step = rate * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
        old = parameter.detach()
        parameter.assign(good.where(old * (1 - rate * decay) - step * direction, old))


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
        gram = ops.matmul(x, x, b_transposed=True)
        mixed = (b * gram + c * ops.matmul(gram, gram)).contiguous()
        x = (a * x + ops.matmul(mixed, x)).contiguous()
    return x.transpose() if tall else x
