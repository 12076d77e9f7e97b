"""From a model and a prompt to more tokens: sessions over a KV cache, prefill and decode."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from tinygrad import Tensor, UOp, Variable
from tinygrad.nn.state import get_state_dict

from tinygpt.errors import InputError, check_int
from tinygpt.model import GPT
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import CapturedStep, capture
from tinygpt.sampling import Sampling, Step, choose


class Generator:
    """Continues prompts with a model, one token after the other.

    Several streams may be taken in turn, or by several threads: each has a KV cache of its own. The
    model's weights are read when a step is first captured, so a Generator belongs to the weights
    its model has then. Past the window generation goes on: a text that outgrows
    `block_size` keeps its newer half (`block_size // 2` tokens), which is read in again.
    """

    def __init__(self, model: GPT, chunk_size: int = 64) -> None:
        """
        Args:
            model: whose weights to use.
            chunk_size: how many tokens of a prompt are read at once, or four times as many where
                more than three times are left. Two sizes for all, so that another prompt's
                length compiles nothing new.
        """
        check_int("chunk_size", chunk_size, low=1)
        self.model = model
        self.chunk_size = min(chunk_size, model.config.block_size)
        self._idle: dict[int, Session] = {}  # one for each batch size, which no stream uses now
        self._lock = Lock()

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 128,
        seed: int | None = None,
        stop_tokens: Collection[int] = (),
        **sampling: Any,
    ) -> Iterator[int]:
        """Yield the ids that continue a prompt, each as soon as it is chosen.

        Args:
            prompt: at least one id. Of one longer than the window the newer half-window is read.
            max_new_tokens: how many ids to yield at most.
            seed: makes the draws the same again on the same backend; None is a new one each time.
            stop_tokens: ids that end the text; they are not yielded.
            sampling: fields of `sampling.Sampling`: temperature (0 is greedy), top_k, top_p,
                min_p, repetition_penalty, frequency_penalty, presence_penalty.
        Raises:
            InputError: for an argument that cannot work, before anything is computed.
        """
        steps = self.generate_batch([prompt], max_new_tokens, seed, stop_tokens, **sampling)
        return (token for (token,) in steps)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        seed: int | Sequence[int] | None = None,
        stop_tokens: Collection[int] = (),
        **sampling: Any,
    ) -> Iterator[list[int | None]]:
        """Continue several prompts at once; each row is what it would have been alone.

        Args:
            prompts: of any lengths, each at least one id.
            seed: one for all rows, or one for each.
        Yields:
            At each step the next id of each row, None for a row that a stop token has ended.
        """
        settings = Sampling.of(**sampling)
        if not prompts:
            raise InputError("no prompts: give at least one")
        if len(prompts) not in self._idle:  # check before even the prompts are copied
            self.model.require_cache_memory(len(prompts), self.model.config.block_size)
        rows = [self._check_prompt(prompt) for prompt in prompts]
        check_int("max_new_tokens", max_new_tokens, low=0)
        seeds = self._check_seeds(seed, len(rows))
        return self._steps(rows, max_new_tokens, seeds, frozenset(stop_tokens), settings)

    def _check_prompt(self, prompt: Sequence[int]) -> list[int]:
        ids, vocab_size = [int(token) for token in prompt], self.model.config.vocab_size
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"token {token} is outside the vocabulary: ids run from 0 to {vocab_size - 1}"
                )
        return ids

    @staticmethod
    def _check_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            return [secrets.randbits(32) for _ in range(count)]
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} prompts: give one, or one for each")
        for value in seeds:
            check_int("seed", value, low=0, below=2**64)
        return seeds

    def _steps(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        seeds: list[int],
        stop_tokens: Collection[int],
        settings: Sampling,
    ) -> Iterator[list[int | None]]:
        choice, inputs = settings.steps(), {}
        counting = any(each.counted for each in choice)
        if not settings.greedy:
            inputs["seeds"] = np.array(seeds, np.uint64)
        if counting:
            inputs["counts"] = _count(rows, self.model.config.vocab_size)
        live = [True] * len(rows)
        contexts = rows
        with self._session(len(rows)) as session:
            for step in range(max_new_tokens):
                if step == 0 or session.full:
                    contexts = [
                        self._window(ids) if alive else [0]
                        for ids, alive in zip(contexts, live, strict=True)
                    ]
                    chosen = session.prefill(contexts, choice, inputs, step)
                else:
                    chosen = session.decode([ids[-1] for ids in contexts], inputs, step)
                for row, token in enumerate(chosen):
                    live[row] = live[row] and token not in stop_tokens
                    if live[row]:
                        contexts[row].append(token)
                        if counting:
                            inputs["counts"][:, row, token] += 1
                if not any(live):
                    return
                yield [token if alive else None for token, alive in zip(chosen, live, strict=True)]

    def _window(self, ids: list[int]) -> list[int]:
        """The part of a text that the model sees: all, or past the window its newer half."""
        block_size = self.model.config.block_size
        return ids if len(ids) <= block_size else ids[-max(1, block_size // 2) :]

    @contextmanager
    def _session(self, batch_size: int) -> Iterator[Session]:
        """A session for one stream alone, as long as it lasts."""
        with self._lock:
            session = self._idle.pop(batch_size, None)
        if session is None:
            session = Session(self.model, batch_size, self.chunk_size)
        try:
            yield session
        finally:
            with self._lock:
                self._idle[batch_size] = session  # one of each size is kept for the next stream


def _count(rows: list[list[int]], vocab_size: int) -> np.ndarray:
    """How often each token stands in each prompt, and (not yet) in the text: (2, B, V)."""
    counts = np.zeros((2, len(rows), vocab_size), np.float32)
    for row, ids in enumerate(rows):
        counts[0, row] = np.bincount(ids, minlength=vocab_size)
    return counts


class Session:
    """A KV cache for one batch size, and the captured steps that read it and write to it.

    Rows stand flush right: shorter ones are padded at the left, so that all have the same next
    position, and the model is told how much of each is padding.

    What a step reads lies in tensors that are captured with it, as the cache is: they cost nothing
    when the step is run, where arguments would have to be looked at.
    """

    def __init__(self, model: GPT, batch_size: int, chunk_size: int) -> None:
        self.model, self.batch_size, self.chunk_size = model, batch_size, chunk_size
        self.block_size = model.config.block_size
        self.cache = model.empty_cache(batch_size, self.block_size)
        self.position = 0  # where the next token stands
        self.padding: Tensor | None = None
        self._chunk_steps: dict[int, CapturedStep] = {}  # by the length of a chunk
        self._choice_steps: dict[tuple, CapturedStep] = {}  # by length, and names of settings
        self._inputs: dict[tuple, Tensor] = {}  # by name and shape: see `_input`
        self._choice: list[Step] = []  # how to choose, and
        self._draws: dict[str, Tensor] = {}  # what else that takes: seeds and counts

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
        key = ("fill" if choice is None else list(choice), self.model.config)
        return capture(partial(function, **held), tensors, key)

    def _fill(self, start_pos: UOp, *, tokens: Tensor) -> Tensor:
        # This is run for what it leaves in the cache. One row is the least to ask for.
        return self.model.hidden_states(tokens, self.cache, start_pos, self.padding, row=0)

    def _next(
        self,
        start_pos: UOp,
        row: int | UOp,
        step: int | UOp,
        *,
        tokens: Tensor,
        choice: list[Step],
        seeds: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        only = None if tokens.shape[1] == 1 else row
        x = self.model.hidden_states(tokens, self.cache, start_pos, self.padding, only)
        return choose(self.model.logits(x[:, 0]), choice, seeds, step, counts)
