"""A tokenizer: a byte-pair encoding, and what GPT-2's files say around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tinygpt.errors import InputError, show

if TYPE_CHECKING:  # imported only where text is handled, which is rare
    from tiktoken import Encoding

END = "<|endoftext|>"
# What tiktoken and `tokenizers` count as white space; Python adds U+001C to U+001F.
_SPACE = r"[^\S\x1c-\x1f]"
# GPT-2's pattern takes white space, less its last character, as one piece, but backtracks through
# it: a million of them overflow tiktoken's stack. Cut just there, the pieces are the same and
# nothing backtracks.
LONG_SPACE = re.compile(rf"(?<!{_SPACE}){_SPACE}{{9999,}}+(?=[\S\x1c-\x1f])")
_SPACES = re.compile(f"{_SPACE}*")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for its own spelling, which is found before anything else is.

    Attributes:
        special: it controls the model, and a text that came from elsewhere may not mean it.
        single_word: it is found only where no letter, digit or underscore stands beside it.
        lstrip, rstrip: the white space before it, after it, belongs to it.
        normalized: it is looked for only in what those that are not leave of a text.
    """

    content: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back, as `transformers` does it with the same files.

    Attributes:
        encoding: of the ordinary tokens. Its special tokens are all others, so that it decodes each
            id; they are not looked for in a text.
        added: those of the others that are.
        prefix_space: whether a text that begins without a space is read as if it had one.
        split_special: whether the spelling of a special token is always text, and never that token.
        before, after: ids that a whole text gets around it.
        bos, eos: the tokens that the files name as a text's begin and end.
        kept: what the files say besides, by their names, to be written back.
    """

    encoding: Encoding
    added: tuple[AddedToken, ...] = ()
    prefix_space: bool = False
    split_special: bool = False
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    bos: int | None = None
    eos: int | None = None
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """gpt2, bytes, char or bpe."""
        return self.encoding.name

    @property
    def n_vocab(self) -> int:
        """One more than the highest id."""
        return self.encoding.n_vocab

    @property
    def ranks(self) -> dict[bytes, int]:
        """The ordinary tokens and their ids."""
        return self.encoding._mergeable_ranks

    @cached_property
    def longest(self) -> int:
        """How many bytes of text one token stands for at most."""
        return max(map(len, [*self.ranks, *(text.encode() for text in self.others)]), default=1)

    @property
    def others(self) -> dict[str, int]:
        """All other tokens and their ids, those that no text gives among them."""
        return self.encoding._special_tokens

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end what a model writes: as its files say, else as the tokenizer's do."""
        generation = self.kept.get("generation_config.json")
        said = self.kept.get("config.json", {}) if generation is None else generation
        found = said.get("eos_token_id")
        if found is None:  # transformers' own file leaves out what it means to be none
            found = self.eos if generation is None else None
        if found is None:
            return ()
        found = [found] if isinstance(found, int) else found
        return tuple(number for number in found if number >= 0)  # people write -1 for none

    @property
    def start(self) -> int | None:
        """The id that stands for an empty prompt."""
        for file in ("generation_config.json", "config.json"):
            found = self.kept.get(file, {}).get("bos_token_id")
            if isinstance(found, int) and found >= 0:
                return found
        return next(
            (number for number in (self.bos, self.eos, *self.ends) if number is not None), None
        )

    def encode(self, text: str, special: bool = True, whole: bool = True) -> list[int]:
        """The ids of a text: by default what `transformers` gives a prompt.

        Args:
            special: whether the spelling of a special token means that token; if not, it is text.
            whole: whether it is a text of its own and not a part of one: then it gets what the
                tokenizer puts around and before a text.
        Raises:
            InputError: for a character the vocabulary lacks, or one that is not valid Unicode.
        """
        ids: list[int] = []
        for part, token in self.parts(text, special):
            if token is not None:
                ids.append(token.id)
                continue
            if whole and self.prefix_space and not part.startswith(" "):
                part = f" {part}"
            ids += self.merge(part)
        return [*self.before, *ids, *self.after] if whole else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids: what a `TextStream` gives, in one piece."""
        from tinygpt.tokenizer.text_stream import TextStream

        stream = TextStream(self)
        return "".join(map(stream.add, ids)) + stream.end()

    def token_bytes(self, number: int) -> bytes:
        """What an id stands for; of one that there is not, a byte that UTF-8 never has."""
        try:
            return self.encoding.decode_single_token_bytes(number)
        except (KeyError, OverflowError):
            return b"\xff"  # a decoder makes it U+FFFD

    def parts(self, text: str, special: bool) -> Iterator[tuple[str, AddedToken | None]]:
        """A text in parts, each ordinary text or an added token's."""
        first, second = self._patterns[special and not self.split_special]
        for part, token in _cut(text, *first):
            if token is not None:
                yield part, token
            else:
                yield from _cut(part, *second)

    @cached_property
    def _patterns(self) -> tuple[tuple[_Pattern, _Pattern], ...]:
        """Without and with the special tokens: what finds those that come first, and the rest."""
        sets = ([each for each in self.added if not each.special], self.added)
        return tuple(
            (
                _pattern([each for each in tokens if not each.normalized]),
                _pattern([each for each in tokens if each.normalized]),
            )
            for tokens in sets
        )

    def merge(self, text: str) -> list[int]:
        """The ids of ordinary text."""
        ranks, ids = self.ranks, list[int]()
        for character in set(text):
            data = utf8(character)
            if data not in ranks and not all(bytes([byte]) in ranks for byte in data):
                raise InputError(  # tiktoken would panic
                    f"character {character!r} (U+{ord(character):04X}) is not in tokenizer "
                    f"{self.name!r}: take it out, or use a model with another tokenizer"
                )
        cuts = [0, *(space.end() - 1 for space in LONG_SPACE.finditer(text)), len(text)]
        for start, end in pairwise(cuts):
            ids += self.encoding.encode_ordinary(text[start:end])
        return ids


_Pattern = tuple[re.Pattern[str], dict[str, AddedToken]]


def _pattern(tokens: Sequence[AddedToken]) -> _Pattern:
    """What finds the tokens, at each place the longest."""
    known = {token.content: token for token in tokens}
    longest_first = sorted(known, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), known


def _cut(
    text: str, pattern: re.Pattern[str], known: Mapping[str, AddedToken]
) -> Iterator[tuple[str, AddedToken | None]]:
    """A text cut at the added tokens in it.

    Source: `AddedVocabulary.find_matches` of the library `tokenizers`.
    """
    at = 0
    for match in pattern.finditer(text):
        token, start, end = known[match[0]], match.start(), match.end()
        beside = text[max(start - 1, 0) : start], text[end : end + 1]
        if token.single_word and any(map(_WORD.match, beside)):
            continue
        while token.lstrip and start > at and _SPACES.fullmatch(text, start - 1, start):
            start -= 1
        if token.rstrip and (after := _SPACES.match(text, end)):
            end = after.end()
        if at < start:
            yield text[at:start], None
        yield text[start:end], token
        at = end
    if at < len(text):
        yield text[at:], None


def utf8(text: str) -> bytes:
    """A text's bytes.

    Raises:
        InputError: where it has what only UTF-16 has.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{show(text)} has half of a surrogate pair, which is not valid Unicode: take it out"
        ) from None
