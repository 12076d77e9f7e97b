"""/study/continue: a text token by token, also without parts of the model."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tinygpt.errors import InputError
from tinygpt.logprobs import Token
from tinygpt.server.choice import token_text
from tinygpt.server.completions import Completion, Limits
from tinygpt.server.fields import COMPLETION, read_fields
from tinygpt.server.problems import Problem
from tinygpt.server.study_fields import CONTINUE, STUDIES
from tinygpt.server.without import Reduced
from tinygpt.study.without import check_parts
from tinygpt.writer import Writer


class Continuation(Completion):
    """A text token by token, with what else might have come before and after the settings."""

    advice = "ask for fewer"

    def __init__(
        self, body: Any, writer: Writer, name: str, limits: Limits, reduced: Reduced
    ) -> None:
        """
        Raises:
            Problem: for what cannot be answered.
        """
        asked = read_fields(body, STUDIES[CONTINUE])
        own = {name: value for name, value in asked.items() if name in COMPLETION}
        top, self.written = asked["top"], asked["written"]
        super().__init__({**own, "logprobs": top, "stream": True}, writer, name, limits)
        heads, blocks = asked["heads"] or [], asked["blocks"] or []
        config = writer.model.config
        try:
            check_parts((config.n_layer, config.n_head), heads, blocks)
        except InputError as error:
            raise Problem(400, str(error), str(error).split()[0], "unknown_part") from error
        self._without = (
            reduced.without([(i, h) for i, h in heads], blocks) if heads or blocks else None
        )

    def submit(self, engine: Any) -> None:
        """Let the text wait for its turn, of the whole model or of what is left of it."""
        super().submit(self._without or engine)

    async def events_of(self) -> AsyncGenerator[dict[str, Any]]:
        """An event for each token, and one for the end."""
        async with aclosing(self.pieces()) as pieces:
            written = not self.asked["echo"]
            if not written:
                yield {"prompt": self.prompts[0].ids}
            async for choice, piece in pieces:
                for token in piece.tokens if written else piece.tokens[: self._prompt_length]:
                    yield self._event(token, prompt=not written)
                if not written:
                    for token in piece.tokens[self._prompt_length :]:
                        yield self._event(token)
                    written = True
                if choice.finish:
                    yield {"finish": choice.finish, "usage": self.usage}

    @property
    def _prompt_length(self) -> int:
        prompt = self.prompts[0]
        return len(prompt.ids) if prompt.shown else 0

    def _event(self, token: Token, prompt: bool = False) -> dict[str, Any]:
        tokenizer = self.writer.tokenizer
        return {
            "id": token.token,
            "text": token_text(tokenizer, token.token),
            "echo": prompt,
            "logprob": token.logprob,
            "likely": [
                {"id": each.token, "text": token_text(tokenizer, each.token),
                 "logprob": each.logprob, "kept": each.kept}
                for each in token.top
            ],
        }  # fmt: skip
