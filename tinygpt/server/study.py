"""/study: what the study tools see in a text, and how it goes on, also without parts of the model.

What is computed is the study tools' own; it runs in the engine's thread, between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np
from tinygrad.nn.state import get_state_dict

from tinygpt.checkpoints.quantization import dtype_of
from tinygpt.errors import InputError
from tinygpt.runtime.memory import require_memory
from tinygpt.server.choice import token_text
from tinygpt.server.engine import Call, Engine
from tinygpt.server.fields import read_fields
from tinygpt.server.problems import (
    Problem,
    check_ids,
    check_model,
    ending,
    queue_full,
    timed_out,
    vocabulary_has_all,
)
from tinygpt.server.study_fields import STUDIES
from tinygpt.server.without import Reduced
from tinygpt.study.attention import HeadScores, entropies, head_scores
from tinygpt.study.attribution import attribute
from tinygpt.study.inside import Inside, look
from tinygpt.study.lens import lens
from tinygpt.study.predictions import predictions
from tinygpt.writer import Writer

_Found = TypeVar("_Found")
_ONCE = 64  # the least tokens that are looked at: kernels are made for this, and twice as many, ...


class Studies:
    """What the handlers of /study share."""

    def __init__(
        self,
        writer: Writer,
        engine: Engine,
        name: str,
        timeout_s: float = 600.0,
        file: str | None = None,
    ) -> None:
        """
        Args:
            name: what clients call the model.
            timeout_s: how many seconds a request may take.
            file: the model as whoever serves it has named it; None: by the same name.
        """
        self.writer, self.engine, self.name, self.file = writer, engine, name, file or name
        self.reduced = Reduced(engine)
        self._inside: Inside | None = None  # of the last text; padded, see `_look`
        self._length = 0  # of that text
        self._scores: HeadScores | None = None
        self._waiting, self.timeout_s = 0, timeout_s

    async def answer(self, path: str, body: Any) -> dict[str, Any]:
        """The answer of an address, but for /study/continue.

        Raises:
            Problem: for what cannot be answered.
        """
        asked = read_fields(body, STUDIES[path])
        ids = await asyncio.to_thread(self._ids, asked)  # a long prompt takes its time
        handlers: Mapping[str, Callable[[list[int], dict[str, Any]], dict[str, Any]]] = {
            "/study/tokens": self._tokens,
            "/study/attention": self._attention,
            "/study/lens": self._lens,
            "/study/attribute": self._attribute,
        }
        return await self._between_steps(lambda: handlers[path](ids, asked))

    def about(self) -> dict[str, Any]:
        """The model, in words and numbers."""
        model, tokenizer = self.writer.model, self.writer.tokenizer
        return {
            "id": self.name,
            "file": self.file,
            "config": asdict(model.config),
            "parameters": model.config.parameter_count,
            "dtype": dtype_of(model.wte),
            "bytes": sum(part.nbytes() for part in get_state_dict(model).values()),
            "tokenizer": tokenizer.name,
            "sampling": self.writer.sampling,
        }

    def _ids(self, asked: Mapping[str, Any]) -> list[int]:
        """The tokens of a request's text."""
        check_model(asked["model"], self.name)
        given, config = asked["prompt"], self.writer.model.config
        with vocabulary_has_all():
            ids = self.writer.encode(given) if isinstance(given, str) else given
        check_ids("prompt", ids, config.vocab_size)
        if len(ids) > config.block_size:
            message = (
                f"the prompt has {len(ids)} tokens, more than the model's window of "
                f"{config.block_size}: give a shorter text"
            )
            raise Problem(400, message, "prompt", "context_length_exceeded")
        return ids

    async def _between_steps(self, function: Callable[[], _Found]) -> _Found:
        """What a function gives in the engine's thread."""
        if self.engine.draining:
            raise ending()
        if self._waiting > self.engine.queue:
            raise queue_full(self._waiting, "studies")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Found] = loop.create_future()

        def settle(found: Any, error: Exception | None) -> None:
            if future.done():  # the client has left
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(found)

        def run() -> None:
            found, error = None, None
            try:
                found = function()
            except Exception as problem:  # it is the request's, and ends nothing else
                error = _problem_of(problem)
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, found, error)

        def refuse(error: Exception) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, None, ending())

        call = Call(run, refuse)
        self._waiting += 1
        try:
            self.engine.call(call)
            return await asyncio.wait_for(future, self.timeout_s)
        except TimeoutError as error:
            raise timed_out(self.timeout_s) from error
        finally:
            call.cancelled = True
            self._waiting -= 1

    # These run in the engine's thread.

    def _look(self, ids: list[int]) -> Inside:
        """A forward pass of a text with zeros behind it, which no token before them sees.

        So there are few lengths, for which kernels are made. That of the last text is kept.
        """
        held = self._inside
        if held is None or self._length != len(ids) or held.ids[: len(ids)] != ids:
            self._inside, size = None, _ONCE
            while size < len(ids):
                size *= 2
            size = min(size, self.writer.model.config.block_size)
            self._require_memory(size)
            try:
                self._inside = held = look(self.writer.model, ids + [0] * (size - len(ids)))
            except InputError as error:  # weights that are no numbers
                raise Problem(500, str(error), code="not_numbers") from error
            self._length = len(ids)
        return held

    def _require_memory(self, size: int) -> None:
        """Refuse a look at so many tokens for which there is too little memory."""
        config = self.writer.model.config
        numbers = config.n_layer * config.n_head * size + config.vocab_size
        numbers += (1 + 2 * config.n_layer) * config.n_embd
        require_memory(8 * size * numbers, f"a look at {size} tokens")  # on the device and here

    def _tokens(self, ids: list[int], asked: Mapping[str, Any]) -> dict[str, Any]:
        inside = self._look(ids)
        found = predictions(replace(inside, ids=ids, logits=inside.logits[: len(ids)]))
        return {
            "tokens": [
                {
                    **self._token(token),
                    "loss": _number(found.loss[i]),
                    "rank": int(found.rank[i]) or None,
                    "entropy": _number(found.entropy[i]),
                    "likeliest": [
                        {**self._token(other), "probability": float(p)}
                        for other, p in zip(found.likeliest[i], found.probability[i], strict=True)
                        if i
                    ],
                }
                for i, token in enumerate(ids)
            ]
        }

    def _attention(self, ids: list[int], asked: Mapping[str, Any]) -> dict[str, Any]:
        T, config = len(ids), self.writer.model.config
        block, head = asked["block"], asked["head"]
        if (block is None) != (head is None):
            missing = "head" if head is None else "block"
            message = f"{missing} is missing: give block and head, or neither"
            raise Problem(400, message, missing, "combination")
        for name, value, size in (("block", block, config.n_layer), ("head", head, config.n_head)):
            if value is not None and value >= size:
                message = f"{name} is {value}: it must be from 0 to {size - 1}"
                raise Problem(400, message, name, "unknown_part")
        attention = self._look(ids).attention[:, :, :T, :T]
        if block is not None:
            rows = attention[block, head]
            weights = [[round(float(w), 6) for w in row[: i + 1]] for i, row in enumerate(rows)]
            return {"block": block, "head": head, "weights": weights}
        if self._scores is None:  # they are the model's, not the text's
            self._scores = head_scores(self.writer.model)
        wide = entropies(attention) if T > 1 else np.full(attention.shape[:2], np.nan)
        heads = [
            {
                "block": i,
                "head": h,
                **{kind: float(getattr(self._scores, kind)[i, h]) for kind in _KINDS},
                "entropy": _number(wide[i, h]),
            }
            for i, h in np.ndindex(wide.shape)
        ]  # fmt: skip
        return {"heads": heads, "chance": self._scores.chance}

    def _lens(self, ids: list[int], asked: Mapping[str, Any]) -> dict[str, Any]:
        index, inside = self._index(ids, asked), self._look(ids)
        part = slice(index, index + 1)
        one = replace(
            inside,
            ids=[ids[index]],
            residuals=inside.residuals[:, part],
            logits=inside.logits[part],
        )
        found = lens(self.writer.model, one)
        return {
            "index": index,
            "places": [
                {
                    "place": place,
                    **self._token(found.likeliest[i, 0]),
                    "probability": float(found.probability[i, 0]),
                    "rank": int(found.rank[i, 0]),
                    "divergence": float(found.divergence[i, 0]),
                }
                for i, place in enumerate(found.places)
            ],
        }

    def _attribute(self, ids: list[int], asked: Mapping[str, Any]) -> dict[str, Any]:
        index, token, against = self._index(ids, asked), asked["token"], asked["against"]
        for name in ("token", "against"):
            if asked[name] is not None:
                check_ids(name, [asked[name]], self.writer.model.config.vocab_size)
        inside = self._look(ids)
        if token is None:
            token = int(inside.logits[index].argmax())
        found = attribute(self.writer.model, inside, token, against, index)
        return {
            "index": index,
            "token": self._token(token),
            "against": None if against is None else self._token(against),
            "logit": found.logit,
            "sum": float(found.values.sum()),
            "parts": [
                {"part": name, "logit": float(value)}
                for name, value in zip(found.components, found.values, strict=True)
            ],
        }

    def _index(self, ids: list[int], asked: Mapping[str, Any]) -> int:
        last, index = len(ids) - 1, asked["index"]
        if index is not None and index > last:
            message = f"index is {index}: the text's tokens are 0 to {last}"
            raise Problem(400, message, "index", "outside_of_text")
        return last if index is None else index

    def _token(self, token: int) -> dict[str, Any]:
        return {"id": int(token), "text": token_text(self.writer.tokenizer, int(token))}


_KINDS = ("previous", "first", "duplicate", "induction")


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return Problem(400, str(error))
    return Problem(500, "the model failed on this text", code="engine_error")


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
