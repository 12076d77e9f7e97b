"""Low-rank adaptation: train two thin matrices for each large one, and add their product to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tinygrad import Tensor

from tinygpt.ops import matmul


class Lora:
    """W = base + alpha / rank * B @ A for every matrix in the blocks, where A and B are trained.

    The model's own weights are W at all times, so a model under training is always the merged one:
    it can be evaluated, sampled from and saved as it is. A's and B's gradients follow from W's.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    def __init__(self, weights: Mapping[str, Tensor], rank: int, alpha: float, seed: int) -> None:
        """
        Args:
            weights: the model's, by name; (out_features, in_features) where they are matrices.
            rank: of B @ A.
            alpha: numerator of the scale.
            seed: of A's first values; B begins at zero.
        """
        self.scale = alpha / rank
        self.targets = {
            name: weight
            for name, weight in weights.items()
            if name.startswith("blocks.") and weight.ndim == 2
        }
        rng = np.random.default_rng(seed)
        self.parameters: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        for name, weight in self.targets.items():
            rows, columns = weight.shape
            bound = columns**-0.5
            down = rng.uniform(-bound, bound, (rank, columns)).astype(np.float32)
            self.parameters[f"{name}.lora_a"] = Tensor(down).to(weight.device)
            up = Tensor.zeros(rows, rank, device=weight.device).contiguous()
            self.parameters[f"{name}.lora_b"] = up
            self.base[f"{name}.base"] = weight.detach().clone()
        Tensor.realize(*self.parameters.values(), *self.base.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What must be kept to go on exactly."""
        return {**self.parameters, **self.base}

    def gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of A and B from those of the weights, by the chain rule."""
        result = {}
        for name in self.targets:
            a, b = self.parameters[f"{name}.lora_a"], self.parameters[f"{name}.lora_b"]
            gradient = gradients[name]  # (out, in)
            result[f"{name}.lora_a"] = self.scale * matmul(b, gradient, a_transposed=True)
            result[f"{name}.lora_b"] = self.scale * matmul(gradient, a, b_transposed=True)
        return result

    def merge(self) -> list[Tensor]:
        """Assign the model's weights anew, and give them to be realised."""
        for name, weight in self.targets.items():
            a, b = self.parameters[f"{name}.lora_a"], self.parameters[f"{name}.lora_b"]
            weight.assign(self.base[f"{name}.base"] + self.scale * matmul(b, a))
        return list(self.targets.values())
