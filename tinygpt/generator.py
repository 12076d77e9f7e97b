"""From a model and a prompt to more tokens: streams of it over slots of a KV cache."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from tinygpt.errors import InputError, check_int, show
from tinygpt.ids import check_range, read_ids
from tinygpt.model import GPT, NOT_NUMBERS
from tinygpt.options import check_names
from tinygpt.sampling import Sampling
from tinygpt.slots import Slots

# Of each model, the slots that streams have left last: under True that of one row, under False
# those of several. The next stream of its size takes them, which saves the time to make them. There
# are no more, and the more go when a single text begins: their cache may be larger than the model.
_idle: WeakKeyDictionary[GPT, dict[bool, Slots]] = WeakKeyDictionary()
_lock = RLock()  # a stream that is collected as garbage may end while its own thread holds it


def _after_fork() -> None:
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Generator:
    """Continues prompts with a model, one token after the other.

    Several streams may be taken in turn, or by several threads: each has a KV cache of its own.
    Past the window generation goes on: a text that outgrows `block_size` keeps its newer half
    (`block_size // 2` tokens), which is read in again.
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

    def __repr__(self) -> str:
        return f"Generator({self.model!r}, chunk_size={self.chunk_size})"

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 128,
        seed: int | None = None,
        stop_tokens: Collection[int] | int | None = (),
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
            InputError: for an argument that cannot work, before anything is computed; and when the
                model's logits are no numbers.
        """
        check_names(Sampling, sampling, "sampling setting")
        steps = self.generate_batch([prompt], max_new_tokens, seed, stop_tokens, **sampling)
        return (token for (token,) in steps if token is not None)

    def generate_batch(
        self,
        prompts: Iterable[Sequence[int]],
        max_new_tokens: int = 128,
        seed: int | Sequence[int] | None = None,
        stop_tokens: Collection[int] | int | None = (),
        **sampling: Any,
    ) -> Iterator[list[int | None]]:
        """Continue several prompts at once; each row is what it would have been alone.

        Args:
            prompts: of any lengths, each at least one id.
            seed: one for all rows, or one for each.
        Yields:
            At each step the next id of each row, None for a row that a stop token has ended.
        """
        settings = Sampling.of(**{name: _plain(value) for name, value in sampling.items()})
        try:
            prompts = list(iter(prompts))
        except TypeError as error:  # from `iter`: a tensor of tinygrad's is no `Iterable` by name
            raise InputError(f"prompts are {show(prompts)}: give a list of rows of ids") from error
        if len(prompts) == 0:
            raise InputError("no prompts: give at least one")
        self.require_memory(len(prompts))
        rows = [self._check_prompt(prompt) for prompt in prompts]
        max_new_tokens = _plain(max_new_tokens)
        check_int("max_new_tokens", max_new_tokens, low=0)
        seeds = self._check_seeds(seed, len(rows))
        return self._steps(rows, max_new_tokens, seeds, _ends(stop_tokens), settings)

    def require_memory(self, batch_size: int) -> None:
        """Refuse a batch that would not fit into memory, before even its prompts are copied."""
        if not self._idle_fits(batch_size):
            self.model.require_cache_memory(batch_size, self.model.config.block_size)

    def _check_prompt(self, prompt: Sequence[int]) -> list[int]:
        ids = read_ids(prompt)
        if ids.ndim != 1:
            raise InputError(f"a prompt has {ids.ndim} axes: give one row of ids for each prompt")
        check_range(ids, self.model.config.vocab_size)
        return ids.tolist()

    @staticmethod
    def _check_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            return [secrets.randbits(32) for _ in range(count)]
        given: Any = seed
        seeds = [given] * count if np.ndim(given) == 0 else list(given)
        seeds = [_plain(value) for value in seeds]
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
        with self.slots(len(rows)) as slots:
            places = [
                slots.start(ids, settings, seed) for ids, seed in zip(rows, seeds, strict=True)
            ]
            live = dict(enumerate(places))
            for _ in range(max_new_tokens):
                found, step = slots.step(chunks=None), list[int | None]([None] * len(rows))
                for row, slot in list(live.items()):
                    token = found[slot].token
                    if not 0 <= token < self.model.config.vocab_size:
                        raise InputError(NOT_NUMBERS)
                    if token in stop_tokens:
                        slots.stop(slot)
                        del live[row]
                    else:
                        step[row] = token
                if not live:
                    return
                yield step

    def _idle_fits(self, batch_size: int) -> bool:
        idle = _idle.get(self.model, {}).get(batch_size == 1)
        return idle is not None and idle.fits(batch_size, self.chunk_size)

    @contextmanager
    def slots(self, batch_size: int) -> Iterator[Slots]:
        """Slots for one stream alone, as long as it lasts."""
        alone, slots = batch_size == 1, None
        with _lock:
            if self._idle_fits(batch_size):
                slots = _idle[self.model].pop(alone)
            for kind in (alone, False):  # first let go of what it holds
                _idle.get(self.model, {}).pop(kind, None)
        if slots is None:
            slots = Slots(self.model, batch_size, self.chunk_size)
        slots.clear()  # the same call gives the same, whatever was before
        try:
            yield slots
        finally:
            with _lock:
                if not slots.collected:
                    _idle.setdefault(self.model, {})[alone] = slots


def _ends(given: Any) -> frozenset[int]:
    """Stop tokens as people hand them over: one, several in any order, or none."""
    if given is None:
        return frozenset()
    ids = list(given) if isinstance(given, Set) else given
    return frozenset(read_ids(ids, may_be_none=True).ravel().tolist())


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's own, which the checks know."""
    return value.item() if isinstance(value, np.generic) else value
