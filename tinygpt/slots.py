"""Texts that begin, go on and end at any time, each in a row of one KV cache: a slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from tinygpt.choosing import Chooser, Row, counts_of
from tinygpt.errors import InputError
from tinygpt.logprobs import Token, scored
from tinygpt.model import GPT
from tinygpt.sampling import Sampling, steps_of
from tinygpt.session import Chosen, Session

# For how many rows a step is made, besides all of them, where it is serving.
_SIZES = (1, 4, 16)


@dataclass(eq=False)
class _Text(Row):
    """What stands in a slot, or stood there last."""

    context: list[int] = field(default_factory=list)  # the tokens that the model sees
    top: int | None = None
    scores: bool = False
    held: int = 0  # how many tokens of the context lie in the cache
    begun: bool = False  # whether its prompt is being read
    prompt: list[Token] = field(default_factory=list)
    ended: int | None = None  # None while it goes on; else how many texts had ended before it

    @property
    def live(self) -> bool:
        return self.ended is None

    @property
    def left(self) -> int:
        """How many tokens are to be read before the next is chosen."""
        return len(self.context) - self.held

    def shared_with(self, other: _Text) -> int:
        """How many tokens at its beginning lie in the cache for another."""
        if self.scores:  # which wants to see what comes of each token
            return 0
        most = min(len(self.context) - 1, other.held)  # the last is read, to choose what follows
        pairs = zip(self.context[:most], other.context, strict=False)
        return next((i for i, (one, two) in enumerate(pairs) if one != two), most)


class Slots:
    """Texts side by side, each at its own position and with its own settings and draws.

    A text is what it would be alone, whatever stands beside it. Its prompt is read in chunks
    between the steps of the others; what it begins with like another is copied from there. Past
    the window it goes on with its newer half, which is read in again.
    """

    def __init__(self, model: GPT, n: int, chunk_size: int = 64, serving: bool = False) -> None:
        """
        Args:
            n: how many texts at most.
            chunk_size: how many tokens of a prompt are read at once: at most so many where it is
                serving, else at least; the other is a quarter, or four times as many.
            serving: make few kinds of steps, each for any settings, so that nothing is compiled
                any more after `compile`: for 1, 4, 16 and n rows. Else each is made when it is
                first needed, for n rows and no other settings than there are, which is faster.
        """
        block_size = model.config.block_size
        self.n, self.serving = n, serving
        self.chunk_size = min(chunk_size, block_size)
        # The large chunk is read where more than three small ones are left.
        self._small = max(1, self.chunk_size // 4) if serving else self.chunk_size
        self._large = self.chunk_size if serving else min(4 * chunk_size, block_size)
        self._sizes = sorted({size for size in _SIZES if serving and size < n} | {n})
        self._session = Session(model, n, logits=serving)
        self._chooser = Chooser(model.config.vocab_size, serving)
        self.clear()

    @property
    def model(self) -> GPT:
        """The model that continues the texts, which must be held elsewhere."""
        return self._session.model

    def fits(self, n: int, chunk_size: int) -> bool:
        """Whether it can be used for so many texts, and the model is still what it was."""
        chunk_size = min(chunk_size, self.model.config.block_size)
        return self._session.fits(n) and self.chunk_size == chunk_size

    @property
    def collected(self) -> bool:
        """Whether its memory is gone: see `Session`."""
        return self._session.collected

    @property
    def free(self) -> int:
        """How many more texts may be started."""
        return sum(not text.live for text in self._texts)

    @property
    def step_count(self) -> int:
        """How many kinds of steps were captured."""
        return self._session.step_count

    def clear(self) -> None:
        """End all texts and forget what they were, so that nothing is copied from them."""
        self._texts = [_Text(ended=0) for _ in range(self.n)]
        self._reading: list[int] = []  # the slots whose prompt is not read yet, in their order
        self._ended = 0

    def start(
        self,
        ids: Sequence[int],
        settings: Sampling | None = None,
        seed: int = 0,
        top: int | None = None,
        bias: Mapping[int, float] | None = None,
        scores: bool = False,
        written: int = 0,
    ) -> int:
        """Begin a text, whose prompt is read by the next steps.

        Args:
            ids: the prompt, at least one id. Of one longer than the window the newer half is read.
            settings: how to choose; None: as `Sampling()` has it.
            seed: of its draws, below 2**64.
            top: give with each token its log-probability, and so many of the likeliest; only where
                it is `serving`.
            bias: what is added to the logits of tokens before anything else.
            scores: give with the first token those of the prompt but for its first, as `top` does.
            written: how many of its last ids count as written, not as prompt, for the penalties.
        Returns:
            the slot, which is taken until `stop`.
        Raises:
            InputError: when none is free.
        """
        if not self.free:
            raise InputError(f"all {self.n} slots are taken: stop one, or make more of them")
        settings = settings or Sampling()
        text = _Text(settings, seed, context=self._window(list(ids)), top=top, scores=scores)
        if bias:
            text.bias = np.zeros(self.model.config.vocab_size, np.float32)
            text.bias[list(bias)] = list(bias.values())
        if any(step.counted for step in steps_of([settings])):
            text.counts = counts_of(ids, written, self.model.config.vocab_size)
        # Where most of it stands already, and of several the slot whose text has ended first.
        slot = max(
            (slot for slot, old in enumerate(self._texts) if old.ended is not None),
            key=lambda slot: (text.shared_with(self._texts[slot]), -(self._texts[slot].ended or 0)),
        )
        text.held = text.shared_with(self._texts[slot])
        self._texts[slot] = text
        self._reading.append(slot)
        return slot

    def stop(self, slot: int) -> None:
        """End a text, or nothing; its slot is free again."""
        old = self._texts[slot]
        if old.live:
            self._ended += 1
            self._texts[slot] = _Text(context=old.context, held=old.held, ended=self._ended)
        if slot in self._reading:
            self._reading.remove(slot)

    def step(self, chunks: int | None = 1) -> dict[int, Token]:
        """Read some of the prompts, and give each text whose prompt is read its next token.

        Args:
            chunks: how many chunks to read at most; None: all that there are, so that every text
                gets a token.
        Returns:
            the tokens, by slot.
        """
        found: dict[int, Token] = {}
        read = 0
        while self._reading and read != chunks:
            text = self._texts[slot := self._reading[0]]
            if not text.begun:
                self._copy_beginning(slot)
            if text.left > 1:
                read += 1
                if token := self._read_chunk(slot):
                    found[slot] = token
            if text.left == 1 or slot in found:
                self._reading.remove(slot)
        ready = [
            slot for slot, text in enumerate(self._texts)
            if text.live and text.left == 1 and slot not in found
        ]  # fmt: skip
        if ready:
            found |= self._decode(ready)
        for slot, token in found.items():
            self._take(slot, token)
        return found

    def compile(self) -> None:
        """Run each step that there can be once, on nothing, where it is `serving`."""
        start = 0 if self.n == 1 else -1
        chunks = [np.zeros(length, np.int32) for length in sorted({self._small, self._large})]
        for chunk in chunks:
            self._session.fill(chunk, start, 0)
        self._session.score(chunks[-1], start, 0)
        if self.n > 1:
            self._session.copy(0, 0)
        for settings in (Sampling(), Sampling(top_k=1)):
            text = _Text(settings)
            for chunk in chunks:
                choice = self._chooser.choice([text])
                self._session.choose(chunk.reshape(1, -1), [start], [0], choice)
            for size in self._sizes:
                choice = self._chooser.choice([text] * size)
                zeros = np.zeros((size, 1), np.int32)
                self._session.choose(zeros, [start] * size, range(size), choice)
        self._chooser.clear()

    def _window(self, ids: list[int]) -> list[int]:
        """The part of a text that the model sees: all, or past the window its newer half."""
        block_size = self.model.config.block_size
        return ids if len(ids) <= block_size else ids[-max(1, block_size // 2) :]

    def _copy_beginning(self, slot: int) -> None:
        """Copy what a text has in common with another, where fewer tokens are read then."""
        text = self._texts[slot]
        text.begun = True
        source = max(range(self.n), key=lambda other: text.shared_with(self._texts[other]))
        shared = text.shared_with(self._texts[source])
        if self._read_for(len(text.context) - shared) < self._read_for(text.left):
            self._session.copy(source, slot)
            text.held = shared

    def _chunk(self, left: int) -> int:
        """How many tokens are read at once where so many are left."""
        return self._large if left > 3 * self._small else self._small

    def _read_for(self, left: int) -> int:
        """How many tokens are read in chunks where so many are left; one alone needs none."""
        read = 0
        while left > 1:
            read += self._chunk(left)
            left -= self._chunk(left)
        return read

    def _read_chunk(self, slot: int) -> Token | None:
        """Read a chunk of a prompt; what follows it, where that was the last."""
        text = self._texts[slot]
        if text.scores:
            self._score_chunk(slot)
            return None
        length = self._chunk(text.left)
        if length < text.left:
            self._session.fill(_array(text.context, text.held, length), text.held, slot)
            text.held += length
            return None
        # The last chunk ends where the text does, and so may read some tokens twice. Of a text
        # shorter than a chunk the rest is zeros: the positions they fill are written again
        # before a query can see them.
        start = max(0, len(text.context) - length)
        chunk = _array(text.context, start, length).reshape(1, -1)
        column = len(text.context) - 1 - start
        choice, wanted = self._chooser.choice([text]), text.top is not None
        chosen = self._session.choose(chunk, [start], [slot], choice, column, wanted)
        text.held = len(text.context)
        return self._token(text, chosen, 0)

    def _score_chunk(self, slot: int) -> None:
        """Read a chunk of a prompt but for its last token, and note what each token costs."""
        text, length = self._texts[slot], self.chunk_size
        last = len(text.context) - 1
        start = min(text.held, max(0, last - length))
        logits = self._session.score(_array(text.context, start, length), start, slot)
        end = min(start + length, last)
        for place in range(text.held, end):
            token, row = text.context[place + 1], logits[place - start]
            text.prompt.append(scored(token, row, None, text.top or 0))
        text.held = end

    def _decode(self, ready: list[int]) -> dict[int, Token]:
        """Read the last token of texts, and choose the next."""
        size, own = next(size for size in self._sizes if size >= len(ready)), set(ready)
        others = (slot for slot in range(self.n) if slot not in own)
        slots = sorted([*ready, *islice(others, size - len(ready))])
        texts = [self._texts[slot] if slot in own else _NOTHING for slot in slots]
        tokens = np.array([text.context[-1] for text in texts], np.int32).reshape(-1, 1)
        starts = [text.held if text.live else -1 for text in texts]
        wanted = any(text.top is not None for text in texts)
        chosen = self._session.choose(
            tokens, starts, slots, self._chooser.choice(texts), logits=wanted
        )
        found = {}
        for row, slot in enumerate(slots):
            if slot in own:
                self._texts[slot].held += 1
                found[slot] = self._token(self._texts[slot], chosen, row)
        return found

    def _token(self, text: _Text, chosen: Chosen, row: int) -> Token:
        token = chosen.tokens[row]
        if text.top is None or not 0 <= token < self.model.config.vocab_size:
            return Token(token, prompt=tuple(text.prompt))
        assert chosen.logits is not None, "these slots give no logits: make them for serving"
        kept = None if chosen.kept is None else chosen.kept[row]
        if text.settings.greedy:
            kept = np.where(np.arange(len(chosen.logits[row])) == token, np.float32(0), -np.inf)
        found = scored(token, chosen.logits[row], kept, text.top)
        return found._replace(prompt=tuple(text.prompt))

    def _take(self, slot: int, token: Token) -> None:
        """Let a token be the last of its text."""
        text, chosen = self._texts[slot], token.token
        text.prompt.clear()
        text.draws += 1
        text.context.append(chosen)
        if text.counts is not None and 0 <= chosen < self.model.config.vocab_size:
            text.counts[:, chosen] += 1
        if len(text.context) > self.model.config.block_size:
            text.context, text.held = self._window(text.context), 0
            self._reading.append(slot)


# What makes up the size of a step.
_NOTHING = _Text(context=[0], ended=0)


def _array(ids: Sequence[int], start: int, length: int) -> np.ndarray:
    """int32 (length,): ids from a place on, and zeros past the last."""
    found = np.zeros(length, np.int32)
    part = ids[start : start + length]
    found[: len(part)] = part
    return found
