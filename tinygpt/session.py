"""A KV cache of several rows, and the captured steps that read it and write to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
from tinygrad import Tensor, Variable
from tinygrad.nn.state import get_state_dict

from tinygpt.choosing import Choice
from tinygpt.model import GPT
from tinygpt.ops.sizes import Position, Whole
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import CapturedStep, capture
from tinygpt.sampling import Step, apply, pick

_NONE = Choice((), {})


class Chosen(NamedTuple):
    """What the rows of one step chose."""

    tokens: list[int]  # -1 or V where a logit was no finite number
    logits: np.ndarray | None  # float32 (B, V): the model's own; None unless they are kept
    kept: np.ndarray | None  # float32 (B, V): after the steps, -inf where ruled out


class Session:
    """A KV cache of n rows, and the steps over it: one for each size that is asked for.

    What a step reads lies in tensors that are captured with it, as the cache is: they cost nothing
    when the step is run, where arguments would have to be looked at.
    """

    def __init__(self, model: GPT, n: int, logits: bool = False) -> None:
        """
        Args:
            n: the rows of the cache.
            logits: whether steps give the logits too.
        """
        self.n, self.logits = n, logits
        self.block_size = model.config.block_size
        self._model = ref(model)  # whoever runs a step has it; an idle session does not keep it
        self._form = _form_of(model)
        self.collected = False
        self.cache = model.empty_cache(n, self.block_size)
        self._steps: dict[tuple, CapturedStep] = {}  # by what they do, sizes, names of settings
        self._inputs: dict[tuple, Tensor] = {}  # by name and shape: see `_input`
        self._written: dict[tuple, np.ndarray] = {}  # what those hold that seldom change

    @property
    def model(self) -> GPT:
        """The model whose session this is."""
        model = self._model()
        assert model is not None
        return model

    def fits(self, n: int) -> bool:
        """Whether it can be used for so many rows, and the model is still what it was.

        Weights and settings are a part of the captured steps: what was replaced would not be seen.
        """
        if self.collected or self.n != n:
            return False
        return self._form == _form_of(self.model)

    def __del__(self) -> None:
        # A stream that is collected in a cycle ends then, and would leave its session to the next
        # one, when the memory of both is gone.
        self.collected = True

    @property
    def step_count(self) -> int:
        """How many kinds of steps were captured."""
        return len(self._steps)

    def fill(self, tokens: np.ndarray, start: int, slot: int) -> None:
        """Read int32 (T,) at a position of one row of the cache."""
        self._run(self._fill, tokens.reshape(1, -1), [start], [slot])

    def score(self, tokens: np.ndarray, start: int, slot: int) -> np.ndarray:
        """As `fill`; the logits after each token, float32 (T, V)."""
        logits = self._run(self._score, tokens.reshape(1, -1), [start], [slot])
        return buffers.read(logits).reshape(len(tokens), -1)

    def choose(
        self,
        tokens: np.ndarray,
        starts: Sequence[int],
        slots: Sequence[int],
        choice: Choice,
        column: int = 0,
        logits: bool = False,
    ) -> Chosen:
        """Read tokens, and choose what follows those in one column.

        Args:
            tokens: int32 (B, T), T being 1 unless B is.
            starts: at which position each row begins; -1 for one that only makes up the size, of
                which nothing is read.
            slots: which row of the cache each takes, no two the same; of all, in their order.
            choice: how each row chooses.
            column: the one.
            logits: give them too, where the session has them.
        """
        B, T = tokens.shape
        row = column if T == 1 else Variable("row", 0, T - 1).bind(column)
        chosen, *more = self._run(self._next, tokens, starts, slots, choice, row)
        tokens_chosen = buffers.read(chosen).tolist()
        if not logits:
            return Chosen(tokens_chosen, None, None)
        return Chosen(tokens_chosen, *(buffers.read(each).reshape(B, -1) for each in more))

    def copy(self, source: int, target: int) -> None:
        """Make one row of the cache what another is."""
        if ("copy",) not in self._steps:
            self._steps["copy",] = self._captured(self._copy, {}, ("copy",))
        # `target` is a reserved word of WebGPU's language.
        places = {"from_slot": source, "to_slot": target}
        self._steps["copy",](*(Variable(k, 0, self.n - 1).bind(i) for k, i in places.items()))

    def _run(
        self,
        function: Callable[..., Any],
        tokens: np.ndarray,
        starts: Sequence[int],
        slots: Sequence[int],
        choice: Choice = _NONE,
        row: Whole = 0,
    ) -> Any:
        """Call a function of what is held, captured at its first call for these sizes."""
        T, start_pos = tokens.shape[1], 0
        held = {"tokens": self._input("tokens", tokens)}
        if self.n == 1:  # one place for all: then plain tensors need not write the whole cache
            start_pos = Variable("start_pos", 0, max(1, self.block_size - T)).bind(starts[0])
        else:
            held["starts"] = self._input("starts", np.array(starts, np.int32))
            if len(slots) < self.n:
                held["slots"] = self._input("slots", np.array(slots, np.int32))
        held |= {name: self._input(name, values) for name, values in choice.inputs.items()}
        bounds = {step.name: self._input(step.name, step.bound) for step in choice.steps}
        key = (function.__name__, tokens.shape, *bounds, *held)
        if key not in self._steps:
            steps = [step._replace(bound=bounds[step.name]) for step in choice.steps]
            choosing = {"steps": steps} if function == self._next else {}
            self._steps[key] = self._captured(
                partial(function, **choosing, **held),
                {**bounds, **held},
                (function.__name__, *(step.function for step in steps)),
            )
        return self._steps[key](start_pos, row)

    def _input(self, name: str, values: np.ndarray) -> Tensor:
        """The values on the device, in the one tensor of the session for that name and shape."""
        if (key := (name, values.shape)) not in self._inputs:
            self._inputs[key] = buffers.tensor(values)
            self._written[key] = values
        elif self._written[key] is not values:  # bounds are the same array as long as rows are
            buffers.write(self._inputs[key], values)
            self._written[key] = values
        return self._inputs[key]

    def _captured(
        self, function: Callable[..., Any], held: Mapping[str, Tensor], what: tuple
    ) -> CapturedStep:
        """A function of what is held, captured at its first call, and kept on disk.

        Args:
            what: it does, which tells it from the session's others.
        """
        tensors = {**held, **get_state_dict(self.model)}
        for i, (keys, values) in enumerate(self.cache):
            tensors |= {f"keys {i}": keys, f"values {i}": values}
        return capture(function, tensors, (what, self.model, type(self), self.logits))

    # These are what is captured. `start_pos` is 0 where there are `starts`.

    def _fill(self, start_pos: Whole, row: Whole, **held: Tensor) -> Tensor:
        # It is run for what it leaves in the cache. One column is the least to ask for.
        return self._hidden_states(start_pos, 0, **held)

    def _score(self, start_pos: Whole, row: Whole, **held: Tensor) -> Tensor:
        return self.model.logits(self._hidden_states(start_pos, None, **held)).contiguous()

    def _next(
        self,
        start_pos: Whole,
        row: Whole,
        *,
        tokens: Tensor,
        steps: Sequence[Step],
        starts: Tensor | None = None,
        slots: Tensor | None = None,
        counts: Tensor | None = None,
        **draws: Tensor,
    ) -> list[Tensor]:
        only = None if tokens.shape[1] == 1 else row
        x = self._hidden_states(start_pos, only, tokens, starts, slots)
        logits = self.model.logits(x[:, 0])
        kept = apply(logits, steps, counts)
        chosen = pick(logits, kept, **draws)
        return [chosen, logits.contiguous(), kept.contiguous()] if self.logits else [chosen]

    def _hidden_states(
        self,
        start_pos: Whole,
        row: Whole | None,
        tokens: Tensor,
        starts: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        place: Position = start_pos if starts is None else starts
        return self.model.hidden_states(tokens, self.cache, place, slots, row)

    def _copy(self, source: Whole, target: Whole) -> list[Tensor]:
        return [
            buffers.written(part, part[target : target + 1], part[source : source + 1].contiguous())
            for pair in self.cache for part in pair
        ]  # fmt: skip


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
