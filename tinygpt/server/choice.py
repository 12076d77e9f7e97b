"""One text that is continued: from tokens to the pieces that a client is sent."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinygpt.logprobs import Token
from tinygpt.tokenizer.text_stream import TextStream
from tinygpt.tokenizer.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what stands for bytes that are no character


@dataclass
class Piece:
    """What may be sent by now."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of each token, in characters of the text

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.text + other.text, self.tokens + other.tokens, self.offsets + other.offsets
        )


class Choice:
    """The text of one choice, piece by piece; whole texts are made of the same pieces.

    A piece splits no character and shows nothing of what may yet be a stop text; a token goes with
    the piece in which its text begins, and not at all where a stop text has cut that.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], index: int) -> None:
        self.index = index
        self.finish: str | None = None  # "stop" or "length", at the end
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, stop)
        self._places, self._echoed = _Places(tokenizer), 0
        self._shown = 0  # characters that were sent
        self._held: list[tuple[int, Token]] = []  # tokens that were not sent, with their offsets

    def echo(self, text: str, ids: Sequence[int], scores: Sequence[Token]) -> Piece:
        """The prompt as the beginning of the text.

        Args:
            text: of the prompt.
            ids: its tokens; none where nobody asked for them.
            scores: of all of them but the first.
        """
        tokens = [Token(each) for each in ids[:1]] + list(scores)
        places = _Places(self._tokenizer)
        self._echoed = self._shown = len(text)
        return Piece(text, tokens, [places.of(token.token) for token in tokens])

    @property
    def stopped(self) -> bool:
        """Whether a stop text is complete."""
        return self._stream.stopped

    def add(self, token: Token) -> Piece:
        """What one more token lets be sent."""
        self._held.append((self._echoed + self._places.of(token.token), token))
        piece = self._shows(self._stream.add(token.token))
        if self.stopped:
            self.finish, self._held = "stop", []
        return piece

    def end(self, finish: str, token: Token | None = None) -> Piece:
        """What was held back, when no more tokens come.

        Args:
            finish: why, unless it is a stop text.
            token: the end token, where it is one: it stands among the tokens, not in the text.
        """
        if token is not None:
            self._held.append((self._echoed + self._places.count, token))
        piece = self._shows(self._stream.end(), last=True)
        self.finish = "stop" if self.stopped else finish
        return piece

    def _shows(self, text: str, last: bool = False) -> Piece:
        self._shown += len(text)
        everything = last and not self.stopped
        count = sum(everything or offset < self._shown for offset, _ in self._held)
        sent, self._held = self._held[:count], self._held[count:]
        return Piece(text, [token for _, token in sent], [offset for offset, _ in sent])


class _Places:
    """Where in a text each of its tokens begins, in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.count = 0  # characters so far

    def of(self, token: int) -> int:
        """The place of the next token; of one within a character, that of the character."""
        raw, begun = self._tokenizer.token_bytes(token), self._decoder.getstate()[0]
        text = self._decoder.decode(raw)
        # A character that was begun and is not gone on with has a place before the token.
        broken = begun and text[:1] == _BROKEN and not (begun + raw).startswith(_BROKEN.encode())
        place, self.count = self.count + bool(broken), self.count + len(text)
        return place


def logprobs_of(piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
    """The field `logprobs` of a piece: a column for each thing, a row for each token."""
    names = [token_text(tokenizer, token.token) for token in piece.tokens]
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in piece.tokens],
        "top_logprobs": [
            None if token.logprob is None else _likely(tokenizer, token) for token in piece.tokens
        ],
        "text_offset": piece.offsets,
    }


def _likely(tokenizer: Tokenizer, token: Token) -> dict[str, float]:
    """The likeliest by their texts; and the token itself, whether it is one of them or not."""
    found: dict[str, float] = {}
    for each in token.top:
        found.setdefault(token_text(tokenizer, each.token), each.logprob)
    if token.logprob is not None:
        found.setdefault(token_text(tokenizer, token.token), token.logprob)
    return found


def special_texts(tokenizer: Tokenizer) -> dict[str, str | None]:
    """The spellings of the begin and end tokens, by the names that templates and clients use."""
    return {
        name: None if token is None else tokenizer.decode([token])
        for name, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos))
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; of one that is a part of a character its bytes, as OpenAI writes them."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
