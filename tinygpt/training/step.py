"""One training step as one captured graph: loss, gradients, clipping and the new weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from tinygpt.training.ranks import Alone, fingerprint
from tinygpt.training.schedule import scheduled
from tinygpt.training.settings import TrainConfig

# float16 holds small gradients only if they are scaled up: as far as they fit, tried again upwards
# after so many updates. Source: Micikevicius et al. 2018, "Mixed Precision Training", 3.2.
_FIRST_SCALE, _SCALE_UP_AFTER = 2.0**16, 2000

_LOSS = "loss"  # beside the weights' names

Batch = tuple[np.ndarray, np.ndarray]  # inputs and targets, each int32 (B, T)


class Outcome(NamedTuple):
    """What a step gave: the batch's loss, the gradients' length, and whether weights changed."""

    loss: float
    norm: float
    good: bool
    tokens: str  # a checksum of those that it has seen, whichever rank had which


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
    copy.placement = model.placement
    for name, weight in get_state_dict(copy).items():
        weight.replace(weights[name])
    return copy


class Trainer:
    """A model and what trains it. The model's weights are updated in place.

    `tensors` and `counters` are all that a step changes or depends on, besides the weights: the
    random numbers of dropout are a function of the seed and the step.
    """

    def __init__(self, model: GPT, config: TrainConfig, ranks: Alone | None = None) -> None:
        """
        Args:
            model: updated in place.
            ranks: the processes that share each batch; None for this one alone.
        """
        self.ranks = ranks or Alone()
        if model.placement.devices and model.placement.split != "batch":
            raise InputError(
                "the model's blocks or heads are shared out over devices: to train it, give each "
                "device all of it (devices.copy_to_all)"
            )
        if config.compute != "float32":
            need_type(config.compute)
        copies = model.placement.count if device.default() in memory.SHARE_MEMORY else 1
        memory.require_memory(12 * copies * model.config.parameter_count, "training this model")
        # In each block gradients need at least its input, query, key, value, both sublayers'
        # results and the hidden layer, if only in 16 bits.
        tokens, shape = config.batch_size * config.block_size // self.ranks.size, model.config
        kept = 2 * tokens * shape.n_layer * (6 * shape.n_embd + shape.inner_dim)
        memory.require_memory(kept, f"a batch of {config.batch_size}")
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
        # Of a step of several batches, or ranks: what those so far have given.
        self._shares = config.accumulate * self.ranks.size
        self._sums: dict[str, Tensor] = {}
        if self._shares > 1:
            shapes = {name: weight.shape for name, weight in self.weights.items()}
            self._sums = self.ranks.sums({**shapes, _LOSS: ()}, model.placement.rest)
        what = (model, config, type(self), self._shares)
        self._whole = capture(self._step, self._named, ("step", *what))
        self._part = capture(self._add, self._named, ("add", *what))
        self._end = capture(self._finish, self._named, ("finish", *what))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What must be kept, besides the weights, to go on exactly."""
        return {**self.optimizer.state, **(self.lora.tensors if self.lora else {})}

    def _named(self) -> dict[str, Tensor]:
        """All tensors that a step touches and is not given."""
        sums = {f"sum of {name}": tensor for name, tensor in self._sums.items()}
        return {**self.weights, **self.tensors, **sums}

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

    def step(self, batches: Iterable[Batch]) -> Outcome:
        """Update the weights once. A loss or gradient that is not finite changes nothing.

        Args:
            batches: `accumulate` of them, of one shape in all calls and the same in all ranks, of
                which each takes its rows. Each is used before the next is asked for; where that
                raises an exception, nothing is changed.
        """
        counters, config = self.counters, self.config
        rate = self.learning_rate
        muon_rate = config.muon_learning_rate * rate / (config.learning_rate or 1)  # in proportion
        updates = counters.updates + 1
        inputs = self.optimizer.inputs(rate, muon_rate, updates, counters.loss_scale)
        place, row, seen = self.model.placement, self.ranks.rank, np.zeros(3, np.float32)
        given = buffers.tensor(inputs.array(), place.rest)
        for i, batch in enumerate(batches):
            tokens, targets = map(self.ranks.rows, batch)
            # Rows are counted through, so that each has a mask of its own.
            stride, parts = self.ranks.size, place.parts(len(tokens))
            firsts = range(row, row + len(batch[0]), stride * len(tokens) // parts)
            keys = [[config.seed, counters.step, first, stride] for first in firsts]
            key = np.array(keys, np.uint32)
            seen += fingerprint(tokens, row, stride)
            row += len(batch[0])
            drawn = place.batch(key) if parts > 1 else buffers.tensor(key[0], place.rest)
            tensors = [*map(place.batch, (tokens, targets)), drawn, given]
            if self._shares == 1:
                result = self._whole(*tensors)
            else:
                self._add_up([*tensors, buffers.tensor(np.array([i > 0]), place.rest)])
        seen = self.ranks.reduce(seen)
        if self._shares > 1:
            result = self.ranks.in_turn("finish", lambda: self._end(given))
        loss, norm, good = buffers.read(result).tolist()
        self._count(good > 0)
        digest = bytes(int(part) & 0xFF for part in seen).hex()
        return Outcome(loss, norm, good > 0, digest)

    def _add_up(self, arguments: list[Tensor]) -> None:
        """Add one of several batches to the sums; one is read for the device to be done with it."""
        self.ranks.in_turn("add", lambda: buffers.read(self._part(*arguments)))

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

    def _step(self, tokens: Tensor, targets: Tensor, key: Tensor, inputs: Tensor) -> Tensor:
        """The graph of a step of one batch.

        Args:
            tokens, targets: int32 (B, T).
            key: what dropout draws from: see GPT.hidden_states.
            inputs: float32 (5,): see `StepInputs`.
        Returns:
            float32 (3,): loss, the gradients' length, and whether both were finite.
        """
        step = StepInputs.of(inputs)
        return self._update(*self.gradients(tokens, targets, key, self._scale(step)), step)

    def _add(
        self, tokens: Tensor, targets: Tensor, key: Tensor, inputs: Tensor, later: Tensor
    ) -> Tensor:
        """The graph of one of several batches, whose shares are added to the sums.

        Args:
            later: bool (1,), whether it is not the first.
        Returns:
            float32 (), the loss so far.
        """
        scale = self._scale(StepInputs.of(inputs))
        loss, gradients = self.gradients(tokens, targets, key, scale)
        for name, value in {**gradients, _LOSS: loss}.items():
            total = self._sums[name]
            before = later.reshape(()).where(total, 0.0) if self.config.accumulate > 1 else 0.0
            total.assign(before + value / self._shares)
        Tensor.realize(*self._sums.values())
        return self._sums[_LOSS]

    def _finish(self, inputs: Tensor) -> Tensor:
        """The graph of what follows the last of several batches; float32 (3,) as of `_step`."""
        sums = {name: buffers.alias(total) for name, total in self._sums.items()}
        return self._update(sums.pop(_LOSS), sums, StepInputs.of(inputs))

    def _scale(self, step: StepInputs) -> Tensor | None:
        return step.loss_scale if self.config.compute == "float16" else None

    def _update(self, loss: Tensor, gradients: dict[str, Tensor], step: StepInputs) -> Tensor:
        if self.lora:
            gradients = self.lora.gradients(gradients)
        norm = global_norm(gradients)
        good = (loss.isfinite() & norm.isfinite()).contiguous()
        written = self.optimizer.updates(gradients, norm, step, good)
        if self.lora:
            written += self.lora.merge()
        result = Tensor.stack(loss, norm, good.float())
        Tensor.realize(result, *written)
        return result

    def gradients(
        self,
        tokens: Tensor,
        targets: Tensor,
        key: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its gradient by each weight.

        Args:
            tokens, targets: int32 (B, T).
            key: where dropout is wanted, what it draws from: see GPT.hidden_states.
            scale: what the loss is multiplied with on the way, None for 1.
        """
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
