"""From a model and a prompt to more tokens: owns the KV cache and the JIT, yields token ids."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from tinygrad import Tensor, UOp, Variable
from tinygrad.nn.state import get_state_dict

from tinygpt.errors import InputError
from tinygpt.model import GPT
from tinygpt.ops.fast import meeting_place
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import CapturedStep, capture
from tinygpt.sampling import Sampling, choose


class Generator:
    """Continues prompts with a model, one token after the other.

    The model's weights are read when a graph is first captured, so a Generator belongs to the
    weights its model has then. Past the window generation goes on: a text that outgrows
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
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise InputError(f"chunk_size is {chunk_size!r}: it must be a whole number, 1 or more")
        self.model = model
        self.chunk_size = min(chunk_size, model.config.block_size)
        self._runners: dict[int, _Runner] = {}  # by batch size

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
        runner = self._runner(len(prompts))  # before so much as the prompts are copied
        rows = [self._check_prompt(prompt) for prompt in prompts]
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise InputError(f"max_new_tokens is {max_new_tokens!r}: it must be a whole number")
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}: it must be 0 or more")
        seeds = self._check_seeds(seed, len(rows))
        return self._steps(runner, rows, max_new_tokens, seeds, frozenset(stop_tokens), settings)

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
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
                raise InputError(f"seed is {value!r}: it must be a whole number from 0 to 2**64-1")
        return seeds

    def _steps(self, runner, rows, max_new_tokens, seeds, stop_tokens, settings):
        inputs: dict[str, np.ndarray] = settings.bounds()
        if not settings.greedy:
            inputs["seeds"] = np.array(seeds, np.uint64)
        if settings.needs_counts:
            inputs["counts"] = _count(rows, self.model.config.vocab_size)
        live = [True] * len(rows)
        contexts = rows
        for step in range(max_new_tokens):
            if step == 0 or runner.full:
                contexts = [
                    self._window(ids) if alive else [0]
                    for ids, alive in zip(contexts, live, strict=True)
                ]
                chosen = runner.read(contexts, inputs, step)
            else:
                chosen = runner.next([ids[-1] for ids in contexts], inputs, step)
            for row, token in enumerate(chosen):
                live[row] = live[row] and token not in stop_tokens
                if live[row]:
                    contexts[row].append(token)
                    if settings.needs_counts:
                        inputs["counts"][:, row, token] += 1
            if not any(live):
                return
            yield [token if alive else None for token, alive in zip(chosen, live, strict=True)]

    def _window(self, ids: list[int]) -> list[int]:
        """The part of a text that the model sees: all, or past the window its newer half."""
        block_size = self.model.config.block_size
        return ids if len(ids) <= block_size else ids[-max(1, block_size // 2) :]

    def _runner(self, batch_size: int) -> _Runner:
        if batch_size not in self._runners:
            self._runners[batch_size] = _Runner(self.model, batch_size, self.chunk_size)
        return self._runners[batch_size]


def _count(rows: list[list[int]], vocab_size: int) -> np.ndarray:
    """How often each token stands in each prompt, and (not yet) in the text: (2, B, V)."""
    counts = np.zeros((2, len(rows), vocab_size), np.float32)
    for row, ids in enumerate(rows):
        counts[0, row] = np.bincount(ids, minlength=vocab_size)
    return counts


class _Runner:
    """A KV cache for one batch size, and the captured graphs that read from it and write to it.

    Rows stand flush right: shorter ones are padded at the left, so that all have the same next
    position, and the model is told how much of each is padding.

    What a graph reads lies in tensors that are captured with it, as the cache is: TinyJit takes
    0.1 ms and more a call for those that it is given.
    """

    def __init__(self, model: GPT, batch_size: int, chunk_size: int) -> None:
        self.model, self.batch_size, self.chunk_size = model, batch_size, chunk_size
        self.block_size = model.config.block_size
        self.cache = model.empty_cache(batch_size, self.block_size)
        self.position = 0  # where the token to be read next stands
        self.padding: Tensor | None = None
        self._read: dict[int, CapturedStep] = {}  # one graph for each length of a chunk
        self._next: dict[tuple, CapturedStep] = {}  # one graph for each set of settings
        self._inputs: dict[tuple, Tensor] = {}  # by name and shape: see `_input`
        self._held: dict[str, Tensor] = {}  # those that say how to choose, in their order

    @property
    def full(self) -> bool:
        """Whether no position is left in the cache."""
        return self.position == self.block_size

    def read(self, contexts: list[list[int]], inputs: dict[str, np.ndarray], step: int) -> list:
        """Fill the cache with each row's tokens, chunk by chunk, and choose the token after them.

        Args:
            inputs: bounds, seeds and counts, as far as they are needed: see `sampling.choose`.
        """
        self._held = {name: self._input(name, values) for name, values in inputs.items()}
        longest = max(map(len, contexts))
        padding = [longest - len(ids) for ids in contexts]
        if self.batch_size > 1:
            self.padding = self._input("padding", np.array(padding, np.int32))
        tokens = np.zeros((self.batch_size, max(longest, self._length(longest))), np.int32)
        for row, ids in enumerate(contexts):
            tokens[row, padding[row] : longest] = ids
        start = 0
        while (length := self._length(longest - start)) < longest - start:
            chunk = self._input("tokens", tokens[:, start : start + length])
            if length not in self._read:
                self._read[length] = self._captured(self._read_chunk, tokens=chunk)
            self._read[length](self._place(start, length))
            start += length
        # The last chunk ends where the text does, and so may read some tokens twice. Of a text
        # shorter than a chunk the rest is zeros: the positions they fill are written again
        # before a query can see them.
        start = max(0, longest - length)
        self.position = longest
        ending = tokens[:, start : start + length]
        return self._choose(ending, start, longest - 1 - start, step)

    def _length(self, rest: int) -> int:
        """Of the next chunk, where so many tokens are left to read."""
        if rest > 3 * self.chunk_size:  # the large one takes the time of three
            return min(4 * self.chunk_size, self.block_size)
        return self.chunk_size if rest > 1 else 1

    def next(self, last: list[int], inputs: dict[str, np.ndarray], step: int) -> list[int]:
        """Read one more token of each row, and choose the one after it.

        Args:
            inputs: those that `read` was given, of which only counts may have changed.
        """
        if "counts" in inputs:
            self._input("counts", inputs["counts"])
        tokens = np.array(last, np.int32).reshape(-1, 1)
        self.position += 1
        return self._choose(tokens, self.position - 1, 0, step)

    def _choose(self, tokens, start, end, step) -> list[int]:
        """Read tokens (B, T) at start, and choose what follows the one in column `end`."""
        length = tokens.shape[1]
        tokens = self._input("tokens", tokens)
        if (key := (length, *self._held)) not in self._next:
            self._next[key] = self._captured(self._next_tokens, tokens=tokens, **self._held)
        chosen = self._next[key](
            self._place(start, length),
            end if length == 1 else Variable("end", 0, length - 1).bind(end),
            Variable("step", 0, 2**31 - 1).bind(step) if "seeds" in self._held else 0,
        )
        return buffers.read(chosen).tolist()

    def _input(self, name: str, values: np.ndarray) -> Tensor:
        """The values on the device, in the one tensor that this runner has for name and shape."""
        if (key := (name, values.shape)) not in self._inputs:
            self._inputs[key] = buffers.tensor(values)
        buffers.write(self._inputs[key], values)
        return self._inputs[key]

    def _place(self, start: int, length: int) -> UOp:
        return Variable("start_pos", 0, max(1, self.block_size - length)).bind(start)

    def _captured(self, function: Callable[..., Tensor], **held: Tensor) -> CapturedStep:
        """The function of what is held, captured at its first call, and without dropout."""

        def named() -> dict[str, Tensor]:
            found = {f"weight {name}": x for name, x in get_state_dict(self.model).items()}
            for i, (keys, values) in enumerate(self.cache):
                found |= {f"keys {i}": keys, f"values {i}": values}
            if self.padding is not None:
                found["padding"] = self.padding
            return found | held | {"sync": meeting_place()}

        step = Tensor.train(mode=False)(partial(function, **held))
        return capture(step, named, (function.__name__, self.model.config))

    def _read_chunk(self, start_pos: UOp, *, tokens: Tensor) -> Tensor:
        return self.model.read(tokens, self.cache, start_pos, self.padding)

    def _next_tokens(
        self, start_pos, end, step, *, tokens, seeds=None, counts=None, **bounds
    ) -> Tensor:
        logits = self.model.read(tokens, self.cache, start_pos, self.padding, end)
        return choose(logits, bounds, seeds, step, counts)
