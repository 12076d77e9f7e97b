"""POST /v1/completions: from a request to texts that run, and from their tokens to the answer."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from tinygpt.errors import InputError
from tinygpt.logprobs import Token
from tinygpt.model import NOT_NUMBERS
from tinygpt.sampling import Sampling
from tinygpt.server.choice import Choice, Piece, logprobs_of
from tinygpt.server.engine import Draining, Full, Job, NotNumbers
from tinygpt.server.fields import COMPLETION, read_fields
from tinygpt.server.problems import (
    Problem,
    check_ids,
    check_model,
    ending,
    queue_full,
    timed_out,
    vocabulary_has_all,
)
from tinygpt.writer import Writer

_USUAL_TOKENS = 16
_SETTINGS = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class Limits:
    """What the program was told to allow."""

    max_tokens: int | None = None  # of one text; None: as the window allows
    timeout_s: float = 600.0
    most_texts: int = 80  # of one request: those that run, and those that may wait


@dataclass(frozen=True)
class Prompt:
    """One of the prompts of a request."""

    ids: list[int]
    text: str  # as echo gives it
    shown: bool  # whether its ids are those of its text; not those that stand for an empty one


class Completion:
    """One request: what it asks for, checked, and the texts that answer it."""

    fields = COMPLETION
    kind, prefix = "text_completion", "cmpl"
    written = 0  # how many of the prompt's last tokens the penalties take for written
    advice = "ask for fewer, or set truncate_prompt"  # where prompt and text are too long

    def __init__(self, body: Any, writer: Writer, name: str, limits: Limits) -> None:
        """
        Raises:
            Problem: for what cannot be answered.
        """
        asked = dict.fromkeys(COMPLETION) | read_fields(body, self.fields)
        self.asked, self.writer, self.name, self.limits = asked, writer, name, limits
        check_model(asked["model"], name)
        self.stream, self.n = asked["stream"], asked["n"]
        self.best_of = asked["best_of"] or self.n
        if self.best_of < self.n:
            message = f"best_of is {self.best_of}, less than n, {self.n}"
            raise Problem(400, message, "best_of", "combination")
        if self.best_of > self.n and self.stream:
            message = "best_of above n cannot be streamed: it is known at the end"
            raise Problem(400, message, "best_of", "combination")
        stop = asked["stop"] or []
        self.stop = [stop] if isinstance(stop, str) else stop
        self.settings = self._settings()
        prompt = self.prompt_of(asked)
        self.max_tokens = asked["max_tokens"]
        if self.max_tokens is None:
            self.max_tokens = min(_USUAL_TOKENS, limits.max_tokens or _USUAL_TOKENS)
        count = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
        if count * self.best_of > limits.most_texts:  # before any of them is read
            message = f"{count * self.best_of} texts at once: this server takes {limits.most_texts}"
            name = "n" if asked["best_of"] is None else "best_of"
            raise Problem(400, message, name, "too_many_texts")
        self.prompts = [self._fits(prompt) for prompt in self._prompts(prompt)]
        self.bias = {int(token): bias for token, bias in (asked["logit_bias"] or {}).items()}
        check_ids("logit_bias", self.bias, writer.model.config.vocab_size)
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.seed = secrets.randbits(32) if asked["seed"] is None else asked["seed"]
        self.completion_tokens = 0
        self.means: dict[int, tuple[int, float]] = {}  # by text: tokens, mean log-probability
        self.heard: Callable[[], None] = lambda: None  # called at each token
        self.jobs: list[Job] = []

    def prompt_of(self, asked: dict[str, Any]) -> Any:
        """What is to be continued."""
        return asked["prompt"]

    def _settings(self) -> Sampling:
        given = {name: self.asked[name] for name in _SETTINGS if self.asked[name] is not None}
        if given.get("top_k") == 0:
            given["top_k"] = None
        try:
            return Sampling.of(**{**self.writer.sampling, **given})
        except InputError as error:  # the model's own files, which nobody checked yet
            raise Problem(500, str(error)) from error

    def _prompts(self, given: Any) -> list[Prompt]:
        if isinstance(given, str):
            return [self._of_text(given)]
        if isinstance(given[0], int):
            return [self._of_ids(given)]
        return [self._of_text(p) if isinstance(p, str) else self._of_ids(p) for p in given]

    def _of_text(self, text: str) -> Prompt:
        window, size = self.writer.model.config.block_size, len(text.encode())
        if size > window * self.writer.tokenizer.longest and not self.asked["truncate_prompt"]:
            # To count its tokens could take seconds.
            message = f"the prompt has {size:,} bytes, more than {window} tokens can be"
            raise Problem(400, f"{message}: {self.advice}", "prompt", "context_length_exceeded")
        with vocabulary_has_all():
            return Prompt(self.writer.encode(text), text, shown=bool(text))

    def _of_ids(self, ids: list[int]) -> Prompt:
        check_ids("prompt", ids, self.writer.model.config.vocab_size)
        return Prompt(ids, self.writer.tokenizer.decode(ids), shown=True)

    def _fits(self, prompt: Prompt) -> Prompt:
        """Refuse what is longer than the window, or shorten it where that was asked for."""
        window, most = self.writer.model.config.block_size, self.limits.max_tokens
        if most is not None and self.max_tokens > most:
            message = f"max_tokens is {self.max_tokens}: this server writes {most} at most"
            raise Problem(400, message, "max_tokens", "too_many_tokens")
        if len(prompt.ids) + self.max_tokens <= window:
            return prompt
        room = window - self.max_tokens
        if self.asked["truncate_prompt"] and room > 0:
            return self._of_ids(prompt.ids[-room:])
        message = (
            f"the prompt has {len(prompt.ids)} tokens and max_tokens is {self.max_tokens}, more "
            f"than the model's window of {window}: {self.advice}"
        )
        raise Problem(400, message, "prompt", "context_length_exceeded")

    def submit(self, engine: Any) -> None:
        """Let the texts wait for their turn.

        Args:
            engine: an `Engine`, or what takes texts as one does.

        Raises:
            Problem: when they cannot.
        """
        loop, self.engine = asyncio.get_running_loop(), engine
        self.events: asyncio.Queue[tuple[int | None, Any]] = asyncio.Queue()

        def telling(index: int) -> Any:
            def tell(event: Token | Exception | None) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return tell

        scores = self.asked["echo"] and self.asked["logprobs"] is not None
        top = self.asked["logprobs"]
        if top is None and self.best_of > self.n:
            top = 0
        jobs, first = list[Job](), dict[tuple[int, ...], int]()
        for number, prompt in enumerate(self.prompts):
            told = scores and first.setdefault(tuple(prompt.ids), number) == number
            for sample in range(self.best_of):
                jobs.append(
                    Job(
                        prompt.ids, self.max_tokens, telling(len(jobs)), self.settings,
                        (self.seed + sample) % 2**64, top, self.bias, told and not sample,
                        self.written, frozenset(self.writer.tokenizer.ends),
                    )
                )  # fmt: skip
        self.jobs = jobs
        # What is said of each prompt's own tokens: its first text is told, for all and those alike.
        self.first = [first.get(tuple(p.ids), i) for i, p in enumerate(self.prompts)]
        self.scored = {} if scores else dict.fromkeys(range(len(self.prompts)), ())
        if not self.max_tokens and not scores:  # there is nothing to compute
            for index in range(len(jobs)):
                self.events.put_nowait((index, None))
            return
        try:
            engine.submit(jobs)
        except Full as error:
            raise queue_full(engine.queue, "texts") from error
        except Draining as error:
            raise ending() from error

    def cancel(self) -> None:
        """End the texts, whether anybody has begun to read them or not."""
        self.engine.cancel(self.jobs)

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece]]:
        """The texts piece by piece, as they come; of a text that has ended the last piece too.

        Raises:
            Problem: when one of them cannot go on.
        """
        choices = [
            Choice(self.writer.tokenizer, self.stop, index) for index in range(len(self.jobs))
        ]
        self.echoed = [not self.asked["echo"]] * len(choices)
        open_choices = set(range(len(choices)))
        held, ready = list[tuple[int, Any]](), deque[tuple[int, Any]]()
        # The deadline is an event like the others: to wait for each of them with a limit takes
        # longer than to handle it.
        late = None, timed_out(self.limits.timeout_s)
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self.limits.timeout_s, self.events.put_nowait, late)
        try:
            while open_choices:
                index, event = ready.popleft() if ready else await self.events.get()
                if index is not None and index not in open_choices:
                    continue
                if isinstance(event, Exception):
                    raise _problem_of(event)
                prompt = self.first[index // self.best_of]
                if prompt not in self.scored:
                    if index != prompt * self.best_of:  # its prompt was in the cache
                        held.append((index, event))
                        continue
                    self.scored[prompt] = () if event is None else event.prompt
                    ready.extend(
                        each for each in held if self.first[each[0] // self.best_of] == prompt
                    )
                choice = choices[index]
                piece = self._piece(choice, event)
                if choice.finish:
                    open_choices.remove(index)
                    self.engine.cancel([self.jobs[index]])
                yield choice, piece
        finally:
            deadline.cancel()
            self.cancel()

    def _piece(self, choice: Choice, token: Token | None) -> Piece:
        piece = Piece()
        if not self.echoed[choice.index]:
            self.echoed[choice.index] = True
            number = choice.index // self.best_of
            prompt, scores = self.prompts[number], self.scored[self.first[number]]
            ids = prompt.ids if prompt.shown and self.asked["logprobs"] is not None else []
            piece = choice.echo(prompt.text, ids, scores)
        if token is None:
            return piece + choice.end("length")
        if not self.max_tokens:
            return piece
        self.completion_tokens += 1
        self.heard()
        if token.logprob is not None:
            count, mean = self.means.get(choice.index, (0, 0.0))
            self.means[choice.index] = count + 1, mean + (token.logprob - mean) / (count + 1)
        if token.token in self.writer.tokenizer.ends:
            return piece + choice.end("stop", token)
        return piece + choice.add(token)

    @property
    def usage(self) -> dict[str, int]:
        """The field `usage`."""
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

    def frame(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer, or one event of it."""
        kind = self.kind + (".chunk" if self.stream and self.kind != Completion.kind else "")
        head = {"id": self.id, "object": kind, "created": self.created}
        return {**head, "model": self.name, "choices": choices, **more}

    def choice_of(self, index: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        """One of the field `choices`."""
        wanted = self.asked["logprobs"] is not None
        logprobs = logprobs_of(piece, self.writer.tokenizer) if wanted else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [Piece() for _ in self.jobs]
        ends: list[str | None] = [None] * len(self.jobs)
        async for choice, piece in self.pieces():
            texts[choice.index] += piece
            ends[choice.index] = choice.finish
        kept = list[int]()
        for first in range(0, len(texts), self.best_of):
            group = range(first, first + self.best_of)
            best = list(group)
            if self.best_of > self.n:  # the mean is of what was written, not of an echoed prompt
                best.sort(key=lambda i: -self.means.get(i, (0, -math.inf))[1])
            kept += best[: self.n]
        choices = [self.choice_of(i, texts[j], ends[j]) for i, j in enumerate(kept)]
        return self.frame(choices, usage=self.usage)

    async def events_of(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer event by event."""
        counted = bool((self.asked["stream_options"] or {}).get("include_usage"))
        more = {"usage": None} if counted else {}
        async for choice, piece in self.pieces():
            if piece.text or piece.tokens or choice.finish:
                yield self.frame([self.choice_of(choice.index, piece, choice.finish)], **more)
        if counted:
            yield self.frame([], usage=self.usage)


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, Draining):
        return ending()
    if isinstance(error, NotNumbers):
        return Problem(500, NOT_NUMBERS, code="not_numbers")
    return Problem(500, "the model failed on this text", code="engine_error")
