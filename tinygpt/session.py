"""One stream of a batch over a KV cache: prefill, then decode, each a captured step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
from tinygrad import Tensor, UOp, Variable
from tinygrad.nn.state import get_state_dict

from tinygpt.model import GPT
from tinygpt.ops.sizes import Whole
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import CapturedStep, capture
from tinygpt.sampling import Step, choose


class Session:
    """A KV cache for one batch size, and the captured steps that read it and write to it.

    Rows stand flush right: shorter ones are padded at the left, so that all have the same next
    position, and the model is told how much of each is padding.

    What a step reads lies in tensors that are captured with it, as the cache is: they cost nothing
    when the step is run, where arguments would have to be looked at.
    """

    def __init__(self, model: GPT, batch_size: int, chunk_size: int) -> None:
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.block_size = model.config.block_size
        self._model = ref(model)  # whoever runs a step has it; an idle session does not keep it
        self._form = _form_of(model)
        self.collected = False
        self.cache = model.empty_cache(batch_size, self.block_size)
        self.position = 0  # where the next token stands
        self.padding: Tensor | None = None
        self._chunk_steps: dict[int, CapturedStep] = {}  # by the length of a chunk
        self._choice_steps: dict[tuple, CapturedStep] = {}  # by length, and names of settings
        self._inputs: dict[tuple, Tensor] = {}  # by name and shape: see `_input`
        self._choice: list[Step] = []  # how to choose, and
        self._draws: dict[str, Tensor] = {}  # what else that takes: seeds and counts

    @property
    def model(self) -> GPT:
        """The model whose session this is."""
        model = self._model()
        assert model is not None
        return model

    def fits(self, batch_size: int, chunk_size: int) -> bool:
        """Whether it can be used for a batch of that size, and the model is still what it was.

        Weights and settings are a part of the captured steps: what was replaced would not be seen.
        """
        if self.collected or (self.batch_size, self.chunk_size) != (batch_size, chunk_size):
            return False
        return self._form == _form_of(self.model)

    def __del__(self) -> None:
        # A stream that is collected in a cycle ends then, and would leave its session to the next
        # one, when the memory of both is gone.
        self.collected = True

    @property
    def full(self) -> bool:
        """Whether no position is left in the cache."""
        return self.position == self.block_size

    def prefill(
        self,
        contexts: list[list[int]],
        choice: list[Step],
        inputs: dict[str, np.ndarray],
        step: int,
    ) -> list[int]:
        """Fill the cache with each row's tokens, chunk by chunk, and choose the token after them.

        Args:
            choice: see `Sampling.steps`.
            inputs: seeds and counts, as far as they are needed: see `sampling.choose`.
            step: which draw of its stream each row makes.
        Returns:
            the id chosen for each row.
        """
        self._choice = [each._replace(bound=self._input(each.name, each.bound)) for each in choice]
        self._draws = {name: self._input(name, values) for name, values in inputs.items()}
        longest = max(map(len, contexts))
        padding = [longest - len(ids) for ids in contexts]
        if self.batch_size > 1:
            self.padding = self._input("padding", np.array(padding, np.int32))
        tokens = np.zeros((self.batch_size, max(longest, self._chunk_length(longest))), np.int32)
        for row, ids in enumerate(contexts):
            tokens[row, padding[row] : longest] = ids
        start = 0
        while (length := self._chunk_length(longest - start)) < longest - start:
            chunk = self._input("tokens", tokens[:, start : start + length])
            if length not in self._chunk_steps:
                self._chunk_steps[length] = self._captured(self._fill, tokens=chunk)
            self._chunk_steps[length](self._start(start, length))
            start += length
        # The last chunk ends where the text does, and so may read some tokens twice. Of a text
        # shorter than a chunk the rest is zeros: the positions they fill are written again
        # before a query can see them.
        start = max(0, longest - length)
        self.position = longest
        return self._choose(tokens[:, start : start + length], start, longest - 1 - start, step)

    def decode(self, last: list[int], inputs: dict[str, np.ndarray], step: int) -> list[int]:
        """Read one more token of each row, and choose the one after it.

        Args:
            last: the tokens.
            inputs: those that `prefill` was given, of which only counts may have changed.
        Returns:
            the id chosen for each row.
        """
        if "counts" in inputs:
            self._input("counts", inputs["counts"])
        self.position += 1
        return self._choose(np.array(last, np.int32).reshape(-1, 1), self.position - 1, 0, step)

    def _chunk_length(self, rest: int) -> int:
        """Of the next chunk, where so many tokens are left to read."""
        if rest > 3 * self.chunk_size:  # the large one takes the time of three
            return min(4 * self.chunk_size, self.block_size)
        return self.chunk_size if rest > 1 else 1

    def _choose(self, ids: np.ndarray, start: int, row: int, step: int) -> list[int]:
        """Read ids (B, T) at start, and choose what follows the one in column `row`."""
        length, tokens = ids.shape[1], self._input("tokens", ids)
        key = (length, *(each.name for each in self._choice), *self._draws)
        if key not in self._choice_steps:
            bounds = {each.name: each.bound for each in self._choice}
            held = {"tokens": tokens, **self._draws}
            function = partial(self._next, choice=self._choice)
            self._choice_steps[key] = self._captured(function, bounds, **held)
        chosen = self._choice_steps[key](
            self._start(start, length),
            row if length == 1 else Variable("row", 0, length - 1).bind(row),
            Variable("step", 0, 2**31 - 1).bind(step) if "seeds" in self._draws else 0,
        )
        return buffers.read(chosen).tolist()

    def _input(self, name: str, values: np.ndarray) -> Tensor:
        """The values on the device, in the one tensor of the session for that name and shape."""
        if (key := (name, values.shape)) not in self._inputs:
            self._inputs[key] = buffers.tensor(values)
        buffers.write(self._inputs[key], values)
        return self._inputs[key]

    def _start(self, start: int, length: int) -> UOp:
        return Variable("start_pos", 0, max(1, self.block_size - length)).bind(start)

    def _captured(
        self,
        function: Callable[..., Tensor],
        choice: Mapping[str, Tensor] | None = None,
        **held: Tensor,
    ) -> CapturedStep:
        """A function of what is held, captured at its first call, and kept on disk.

        Args:
            choice: the bounds of the choice that the function makes, in order; None: it makes none.
        """
        tensors = {**(choice or {}), **held, **get_state_dict(self.model)}
        for i, (keys, values) in enumerate(self.cache):
            tensors |= {f"keys {i}": keys, f"values {i}": values}
        if self.padding is not None:
            tensors["padding"] = self.padding
        functions = None if choice is None else [each.function for each in self._choice]
        key = (functions, self.model, type(self))
        return capture(partial(function, **held), tensors, key)

    def _fill(self, start_pos: UOp, *, tokens: Tensor) -> Tensor:
        # This is run for what it leaves in the cache. One row is the least to ask for.
        return self.model.hidden_states(tokens, self.cache, start_pos, self.padding, row=0)

    def _next(
        self,
        start_pos: UOp,
        row: Whole,
        step: Whole,
        *,
        tokens: Tensor,
        choice: list[Step],
        seeds: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        only = None if tokens.shape[1] == 1 else row
        x = self.model.hidden_states(tokens, self.cache, start_pos, self.padding, only)
        return choose(self.model.logits(x[:, 0]), choice, seeds, step, counts)


def _form_of(value: Any) -> Any:
    """All that a captured step takes from a model: classes, settings, and where the weights lie."""
    if isinstance(value, Tensor):
        return buffers.place(value)
    if isinstance(value, list | tuple):
        return [_form_of(item) for item in value]
    kind = type(value)
    if not kind.__module__.startswith("tinygpt."):
        return value
    return [kind, *vars(kind).values(), *((k, _form_of(v)) for k, v in vars(value).items())]
