"""GPT-2's vocabulary and merges to tiktoken and back, checked so that both give the same ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from tinygpt.errors import CheckpointError, show
from tinygpt.tokenizer.tokenizer import END, AddedToken, Tokenizer

SURROGATE = re.compile("[\ud800-\udfff]")  # what JSON can spell but UTF-8 cannot
_NEVER = 2**31  # more than any id
# The parts of a token are joined in steps of its length: for GPT-2's tokens together 2.6 million.
_MOST_STEPS = 8_000_000
_MOST_OTHERS = 1 << 16

# GPT-2's files spell a byte as one visible character: itself where it is printable Latin-1, else
# the next free one from U+0100. Source: `bytes_to_unicode` in GPT-2's encoder.py.
_PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_STAND_INS = {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in _PLAIN)}
_BYTE_OF = {_STAND_INS.get(b, chr(b)): b for b in range(256)}
_BYTE_AT = {ord(character): byte for character, byte in _BYTE_OF.items()}  # for str.translate
# The SHA-256 of GPT-2's merges, one a line: a pair with a space between.
_GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"


class _Unfit(Exception):
    """What is wrong with a vocabulary; `from_merges` adds whose it is."""


def from_merges(
    vocab: Any, merges: Any, source: str, added: Sequence[AddedToken] | None = None, **around: Any
) -> Tokenizer:
    """GPT-2's vocabulary and merges as a tokenizer, if tiktoken merges as they say.

    tiktoken joins the two parts that make the token of lowest id, GPT-2 those of the first merge.
    Both come to the same when ids rise with the merges, and each merge is what earlier ones leave.

    Args:
        vocab: token, in GPT-2's spelling, -> id. Neither this nor `merges` need be checked before.
        merges: in order, each two tokens: as a list, or as a text with a space between them.
        source: where they come from, for the error.
        added: the tokens that stand for their own spelling, whether `vocab` has them or not. By
            default the end token is, where `vocab` has it.
        around: the tokenizer's other attributes.
    Raises:
        CheckpointError: when they are not of that form, or tiktoken would give other ids.
    """
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str

    try:
        if added is None:
            has_end = isinstance(vocab, dict) and END in vocab
            added = [AddedToken(END, vocab[END])] if has_end else []
            around.setdefault("eos", vocab[END] if has_end else None)
        tokens = _with_added(vocab, added)
        ranks = _ranks_of_gpt2(tokens, merges) or _checked_ranks(vocab, tokens, merges, source)
        others = _other_tokens(tokens, ranks, {token.content for token in added})
        if not ranks:
            raise _Unfit("the vocabulary has no byte: it must have one at least")
    except _Unfit as error:
        raise CheckpointError(
            f"tokenizer {source!r}: {error}; copy its files again, or use another"
        ) from error
    encoding = Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=others)
    return Tokenizer(encoding, tuple(added), **around)


def _ranks_of_gpt2(tokens: Any, merges: Any) -> dict[bytes, int] | None:
    """The ranks of GPT-2's own vocabulary, which need no proof; None for any other.

    It is known by a digest of its merges, from which its ids follow. To check them takes 0.8 s.
    """
    if not isinstance(tokens, dict) or not isinstance(merges, list) or len(merges) != 50_000:
        return None
    if not all(isinstance(m, str) or (isinstance(m, list) and len(m) == 2) for m in merges):
        return None
    try:
        text = "\n".join(m if isinstance(m, str) else " ".join(m) for m in merges)
        digest = hashlib.sha256(text.encode()).hexdigest()
    except (TypeError, UnicodeEncodeError):
        return None
    if digest != _GPT2_MERGES or set(map(type, tokens.values())) != {int}:
        return None
    spelled = [*map(chr, _PLAIN), *_STAND_INS.values(), *text.replace(" ", "").split("\n")]
    count = len(spelled)
    others = {token: tokens[token] for token in tokens.keys() - set(spelled)}
    if (
        list(map(tokens.get, spelled)) != list(range(count))
        or min(others.values(), default=count) < count
    ):
        return None
    _check_vocabulary(others, [])
    data = "".join(spelled).translate(_BYTE_AT).encode("latin-1")
    ends = list(accumulate(map(len, spelled)))
    return {data[start:end]: i for i, (start, end) in enumerate(pairwise([0, *ends]))}


def _checked_ranks(vocab: Any, tokens: Any, merges: Any, source: str) -> dict[bytes, int]:
    """The ranks of any vocabulary, if tiktoken merges by them as its merges say."""
    _check_vocabulary(tokens, merges)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    ranks = _rank(vocab, merges)
    for merge, usual in zip(merges, find_merges(ranks, source), strict=True):
        if merge != usual:
            raise _Unfit(f"merge {show(merge)} cannot happen: earlier ones leave {show(usual)}")
    return ranks


def _with_added(vocab: Any, added: Sequence[AddedToken]) -> Any:
    """A vocabulary with the added tokens that it lacks; one that is none, as it is."""
    if not isinstance(vocab, dict):
        return vocab
    tokens = dict(vocab)
    for token in added:
        if tokens.setdefault(token.content, token.id) != token.id:
            fact = f"id {token.id}, in the vocabulary {show(tokens[token.content])}"
            raise _Unfit(f"added token {show(token.content)} has {fact}")
    return tokens


def _check_vocabulary(vocab: Any, merges: Any) -> None:
    """Every token must be some text, and every id a number of its own."""
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise _Unfit(
            f"vocabulary {show(vocab)} and merges {show(merges)} must be an object and a list"
        )
    if len(merges) > len(vocab):
        raise _Unfit(f"it has {len(merges)} merges for {len(vocab)} tokens")
    owner: dict[int, str] = {}
    for token, number in vocab.items():
        if not token or SURROGATE.search(token):
            raise _Unfit(f"token {show(token)} must be some text, in valid Unicode")
        if type(number) is not int or not 0 <= number < _NEVER:
            whole = f"a whole number from 0 to {_NEVER - 1}"
            raise _Unfit(f"token {show(token)} has id {show(number)}, not {whole}")
        if owner.setdefault(number, token) != token:
            raise _Unfit(f"id {number} is both {show(owner[number])} and {show(token)}")


def _rank(vocab: dict[str, int], merges: list[Any]) -> dict[bytes, int]:
    """The ids of the single bytes and of what the merges make, which must rise with the merges."""
    ranks = {bytes([byte]): vocab[spelt] for spelt, byte in _BYTE_OF.items() if spelt in vocab}
    last = -1
    for merge in merges:
        match merge:
            case [str(left), str(right)] if {left, right, left + right} <= vocab.keys():
                token, number = left + right, vocab[left + right]
            case _:
                raise _Unfit(f"merge {show(merge)} is not two tokens that make a known third")
        if not _BYTE_OF.keys() >= set(token):
            raise _Unfit(f"merge {show(merge)} has a character that stands for no byte")
        if number <= last:
            raise _Unfit(f"merge {show(merge)} makes id {number} after {last}: ids must rise")
        ranks[bytes(_BYTE_OF[character] for character in token)] = last = number
    return ranks


def _other_tokens(
    tokens: dict[str, int], ranks: dict[bytes, int], added: set[str]
) -> dict[str, int]:
    """The tokens that no merge makes: an added one may look like any, another like no byte."""
    ordinary = set(ranks.values())
    others = {token: number for token, number in tokens.items() if number not in ordinary}
    for token in others.keys() - added:
        if not set(token).isdisjoint(_STAND_INS.values()):
            raise _Unfit(f"token {show(token)} is a byte-level one that no merge makes")
    length = sum(map(len, others))
    if length > _MOST_OTHERS:  # tiktoken makes one pattern of them all
        raise _Unfit(f"it has {length} characters of special tokens: at most {_MOST_OTHERS}")
    return others


def find_merges(ranks: dict[bytes, int], source: str) -> list[list[str]]:
    """The merge that makes each longer token: the two parts that all earlier merges leave of it.

    Args:
        ranks: token -> id, of which the lower is merged first.
        source: where they come from, for the error.
    Returns:
        the merges in the order of their ids, each two tokens in GPT-2's spelling.
    Raises:
        CheckpointError: for a token that no merge makes, or tokens too long to try them all.
    """
    if sum(len(token) ** 2 for token in ranks) > _MOST_STEPS:
        raise CheckpointError(f"tokenizer {source!r}: its tokens are too long; use another")
    merges, earlier = [], {}
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            first = min(earlier.get(left + right, _NEVER) for left, right in pairwise(parts))
            if first == _NEVER:
                raise CheckpointError(
                    f"tokenizer {source!r}: no merge of two earlier tokens makes "
                    f"{show(spell(token))}; use a tokenizer of GPT-2's form"
                )
            joined = parts[:1]
            for part in parts[1:]:
                if earlier.get(joined[-1] + part) == first:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        merges.append([spell(part) for part in parts])
        earlier[token] = ranks[token]
    return merges


def spell(token: bytes) -> str:
    """A token as GPT-2's files have it."""
    return token.decode("latin-1").translate(_STAND_INS)
