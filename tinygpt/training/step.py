"""One training step as one captured graph: loss, gradients, clipping and the new weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt.config import GPTConfig
from tinygpt.errors import InputError, quiet
from tinygpt.model import GPT
from tinygpt.runtime import buffers, device, memory
from tinygpt.runtime.capture import capture
from tinygpt.training.lora import Lora
from tinygpt.training.optimizers import Optimizer, StepInputs, global_norm
from tinygpt.training.schedule import scheduled
from tinygpt.training.settings import TrainConfig

# float16 holds small gradients only if they are scaled up: as far as they fit, tried again upwards
# after so many updates. Source: Micikevicius et al. 2018, "Mixed Precision Training", 3.2.
_FIRST_SCALE, _SCALE_UP_AFTER = 2.0**16, 2000


Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each int32 (B, T)


class Outcome(NamedTuple):
    """What a step gave: the batch's loss, the gradients' length, and whether weights changed."""

    loss: float
    norm: float
    good: bool


@dataclass
class Counters:
    """The part of a run's state that is plain numbers."""

    step: int = 0  # batches taken, with the skipped
    updates: int = 0  # of the weights
    skipped: int = 0  # steps whose loss or gradients were not finite
    skipped_in_a_row: int = 0
    loss_scale: float = 1.0
    updates_at_scale: int = 0  # since the loss scale last changed


def sharing_weights(model: GPT, config: GPTConfig) -> GPT:
    """A model of another configuration of the same shape, whose weights are those of this one."""
    copy, weights = GPT(config, seed=None), get_state_dict(model)
    for name, weight in get_state_dict(copy).items():
        weight.replace(weights[name])
    return copy


class Trainer:
    """A model and what trains it. The model's weights are updated in place.

    `tensors` and `counters` are all that a step changes or depends on, besides the weights: the
    random numbers of dropout are a function of the seed and the step.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        if config.compute != "float32":
            need_type(config.compute)
        memory.require_memory(12 * model.config.parameter_count, "training this model")
        self.model, self.config = model, config
        self.weights = get_state_dict(model)
        self.lora = None
        if config.lora_rank:
            self.lora = Lora(self.weights, config.lora_rank, config.lora_alpha, config.seed)
        self.optimizer = Optimizer(
            self.lora.parameters if self.lora else self.weights,
            config.optimizer,
            config.beta1,
            config.beta2,
            config.weight_decay,
            config.grad_clip,
        )
        self.counters = Counters(loss_scale=_FIRST_SCALE if config.compute == "float16" else 1.0)
        self._captured = capture(self._step, self._named, (model, config, type(self)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What must be kept, besides the weights, to go on exactly."""
        return {**self.optimizer.state, **(self.lora.tensors if self.lora else {})}

    def _named(self) -> dict[str, Tensor]:
        """All tensors that a step touches and is not given."""
        return {**self.weights, **self.tensors}

    @property
    def learning_rate(self) -> float:
        """AdamW's in the next step."""
        config = self.config
        return scheduled(
            self.counters.step,
            config.steps,
            config.warmup_steps,
            config.schedule,
            config.learning_rate,
            config.min_learning_rate,
        )

    def step(self, batches: Sequence[Batch]) -> Outcome:
        """Update the weights once. A loss or gradient that is not finite changes nothing.

        Args:
            batches: `accumulate` of them, of one shape in all calls.
        """
        counters, config = self.counters, self.config
        rate = self.learning_rate
        muon_rate = config.muon_learning_rate * rate / (config.learning_rate or 1)  # in proportion
        updates = counters.updates + 1
        inputs = self.optimizer.inputs(rate, muon_rate, updates, counters.loss_scale)
        rows, keys = 0, []
        for tokens, _ in batches:  # rows are counted through, so that each has a mask of its own
            keys.append(np.array([config.seed, counters.step, rows], np.uint32))
            rows += len(tokens)
        # Each array is an input of its own: a slice of one would be captured where it lies.
        given = zip(batches, keys, strict=True)
        arrays = [array for (tokens, targets), key in given for array in (tokens, targets, key)]
        tensors = [buffers.tensor(array) for array in arrays]
        result = self._captured(tensors, buffers.tensor(inputs.array()))
        loss, norm, good = buffers.read(result).tolist()
        self._count(good > 0)
        return Outcome(loss, norm, good > 0)

    def _count(self, good: bool) -> None:
        counters = self.counters
        counters.step += 1
        counters.updates += good
        counters.skipped += not good
        counters.skipped_in_a_row = 0 if good else counters.skipped_in_a_row + 1
        if self.config.compute == "float16":
            counters.updates_at_scale = counters.updates_at_scale + 1 if good else 0
            if not good:
                counters.loss_scale = max(1.0, counters.loss_scale / 2)
            elif counters.updates_at_scale == _SCALE_UP_AFTER:
                counters.loss_scale, counters.updates_at_scale = counters.loss_scale * 2, 0

    def _step(self, arrays: list[Tensor], inputs: Tensor) -> Tensor:
        """The graph of a step.

        Args:
            arrays: tokens and targets, int32 (B, T), and a key, uint32 (3,), for each batch.
            inputs: float32 (5,): see `StepInputs`.
        Returns:
            float32 (3,): loss, the gradients' length, and whether both were finite.
        """
        step = StepInputs.of(inputs)
        scale = step.loss_scale if self.config.compute == "float16" else None
        batches = list(zip(arrays[::3], arrays[1::3], arrays[2::3], strict=True))
        total, gradients = self.gradients(batches, scale)
        if self.lora:
            gradients = self.lora.gradients(gradients)
        norm = global_norm(gradients)
        good = (total.isfinite() & norm.isfinite()).contiguous()
        written = self.optimizer.updates(gradients, norm, step, good)
        if self.lora:
            written += self.lora.merge()
        result = Tensor.stack(total, norm, good.float())
        Tensor.realize(result, *written)
        return result

    def gradients(
        self, batches: Sequence[tuple[Tensor, ...]], scale: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of all batches, and its gradient by each weight.

        Args:
            batches: tokens and targets, each int32 (B, T), and where dropout is wanted the key that
                it draws from, uint32 (3,).
            scale: what the loss is multiplied with on the way, None for 1.
        """
        count = len(batches)
        total, sums = None, {}
        for i, batch in enumerate(batches):
            loss, gradients = self._batch_gradients(scale, *batch)
            if count == 1:
                return loss, gradients
            # Realised one batch after the other, so that memory is that of one.
            loss = loss / count
            total = loss.contiguous() if total is None else total.assign(total + loss)
            for name, gradient in gradients.items():
                share = gradient / count
                sums[name] = sums[name].assign(sums[name] + share) if i else share.contiguous()
            Tensor.realize(total, *sums.values())
        return total, sums

    def _batch_gradients(
        self,
        scale: Tensor | None,
        tokens: Tensor,
        targets: Tensor,
        key: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        masters = [buffers.alias(weight) for weight in self.weights.values()]
        with self._rounded_weights():
            loss = self.model.losses(tokens, targets, key).mean()
        gradients = (loss if scale is None else loss * scale).gradient(*masters)
        if scale is not None:
            gradients = [gradient / scale for gradient in gradients]
        whole = (gradient.contiguous() for gradient in gradients)  # computed once, for two uses
        return loss, dict(zip(self.weights, whole, strict=True))

    @contextmanager
    def _rounded_weights(self) -> Iterator[None]:
        """The model computes with weights rounded to the configured type; they stay float32."""
        if self.config.compute == "float32":
            yield
            return
        dtype = getattr(dtypes, self.config.compute)
        masters = {name: buffers.alias(weight) for name, weight in self.weights.items()}
        try:
            for weight in self.weights.values():
                weight.replace(weight.cast(dtype).float().contiguous())
            yield
        finally:
            for name, weight in self.weights.items():
                weight.replace(masters[name])


def need_type(name: str) -> None:
    """Refuse a type that the backend cannot compute in, such as bfloat16 with an older clang.

    Raises:
        InputError: naming it.
    """
    works = None
    with suppress(Exception), quiet():  # what the compiler would say there is no news to the user
        works = (Tensor([1.5] * 64).cast(getattr(dtypes, name)).contiguous() + 1).float().tolist()
    if works != [2.5] * 64:
        raise InputError(
            f"compute is {name!r}, which {device.describe()} cannot do: use float32, or another "
            "backend"
        )
