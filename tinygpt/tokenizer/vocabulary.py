"""GPT-2's vocabulary files to tiktoken and back, checked so that both give the same ids."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.checkpoints import gguf_file
from tinygpt.errors import CheckpointError, InputError, show
from tinygpt.storage import read_json

if TYPE_CHECKING:  # imported where text is handled: most of the package never does
    from tiktoken import Encoding

SURROGATE = re.compile("[\ud800-\udfff]")  # what JSON can spell but UTF-8 cannot
_NEVER = 2**31  # more than any id
END = "<|endoftext|>"
# The parts of a token are joined in steps of its length: for GPT-2's tokens together 2.6 million.
_MOST_STEPS = 8_000_000
_MOST_SPECIAL = 1 << 16
# The kinds of tokens in GGUF, and what llama.cpp's converter calls those that no text gives.
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5

# GPT-2's files spell a byte as one visible character: itself where it is printable Latin-1, else
# the next free one from U+0100. Source: `bytes_to_unicode` in GPT-2's encoder.py.
_PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_STAND_INS = {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in _PLAIN)}
_BYTE_OF = {_STAND_INS.get(b, chr(b)): b for b in range(256)}


def from_tokenizers(path: Path) -> Encoding:
    match read_json(path):
        case {
            "model": dict(model),
            "pre_tokenizer": dict(split),
            "added_tokens": list(added),
            **other,
        }:
            vocab, merges = model.get("vocab"), model.get("merges")
        case content:
            raise CheckpointError(
                f"{str(path)!r} holds {show(content)}: it must have a model, a pre_tokenizer and "
                "added_tokens; save the tokenizer again"
            )
    for name, value, usual in (
        ("normalizer", other.get("normalizer"), None),
        ("pre_tokenizer.type", split.get("type"), "ByteLevel"),
        ("pre_tokenizer.add_prefix_space", split.get("add_prefix_space"), False),
        ("pre_tokenizer.use_regex", split.get("use_regex", True), True),
        ("model.type", model.get("type", "BPE"), "BPE"),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix") or "", ""),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix") or "", ""),
    ):
        if value != usual:
            raise CheckpointError(
                f"{str(path)!r}: {name} is {show(value)}, but only a tokenizer of GPT-2's form, "
                f"where it is {usual!r}, can be read; use another"
            )
    if isinstance(vocab, dict):
        for token in added:
            match token:
                case {"content": str(text), "id": number} if (
                    vocab.setdefault(text, number) == number
                ):
                    continue
            raise CheckpointError(
                f"{str(path)!r}: added token {show(token)} must have a content and the id that "
                "the vocabulary has for it, if any; save the tokenizer again"
            )
    return from_merges(vocab, merges, str(path))


def gguf_metadata(tokenizer: Encoding | None, vocab_size: int) -> dict[str, Any]:
    """A tokenizer as GGUF's metadata have it, padded with unused tokens to the model's ids.

    Source: the GGUF specification, "Tokenizer", and llama.cpp's `convert_hf_to_gguf.py`.

    Raises:
        InputError: for a tokenizer that is not a byte-level BPE.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    merges = find_merges(ranks, tokenizer.name)
    names = {number: spell(token) for token, number in ranks.items()}
    if odd := {part for merge in merges for part in merge}.difference(names.values()):
        fact = f"has tokens of bytes such as {show(min(odd))} that are none themselves"
        raise InputError(f"tokenizer {tokenizer.name!r} {fact}, which GGUF's gpt2 cannot say")
    names |= {number: token for token, number in special.items()}
    kinds = {number: _CONTROL if number in special.values() else _NORMAL for number in names}
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [kinds.get(i, _UNUSED) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": False,
    }
    if (end := special.get(END)) is not None:
        found |= {f"tokenizer.ggml.{x}_token_id": end for x in ("bos", "eos", "unknown")}
    return found


def from_gguf(path: Path) -> Encoding | None:
    """The tokenizer that a GGUF file brings; None for a file of another form, or without one."""
    with open(path, "rb") as file:
        if file.read(4) != gguf_file.MAGIC:
            return None
    metadata = gguf_file.read_header(path)[1]
    found = {x: metadata.get(f"tokenizer.ggml.{x}") for x in ("model", "pre", "tokens", "merges")}
    kinds = metadata.get("tokenizer.ggml.token_type")
    try:
        match found:
            case {"model": None | "no_vocab"}:
                return None
            case {"model": "gpt2", "pre": None | "default" | "gpt-2", "tokens": list(tokens)}:
                merges = found["merges"] if isinstance(found["merges"], list) else []
            case _:
                raise InputError(f"its tokenizer is {show(found)}: it must be gpt2's")
        spare = np.flatnonzero(kinds == _UNUSED) if isinstance(kinds, np.ndarray) else ()
        vocab: dict[str, int] = {}
        for number in sorted(set(range(len(tokens))).difference(spare)):
            if vocab.setdefault(tokens[number], number) != number:
                raise InputError(f"its token {show(tokens[number])} is there twice")
        return from_merges(vocab, merges, str(path))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def from_merges(vocab: Any, merges: Any, source: str) -> Encoding:
    """GPT-2's vocabulary and merges as an Encoding, if tiktoken merges as they say.

    tiktoken joins the two parts that make the token of lowest id, GPT-2 those of the first merge.
    Both come to the same when ids rise with the merges, and each merge is what earlier ones leave.
    """
    from tiktoken import Encoding
    from tiktoken_ext.openai_public import r50k_pat_str

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(
            f"tokenizer {source!r}: {what}; copy its files again, or use another"
        )

    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise wrong(
            f"vocabulary {show(vocab)} and merges {show(merges)} must be an object and a list"
        )
    if len(merges) > len(vocab):
        raise wrong(f"it has {len(merges)} merges for {len(vocab)} tokens")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    owner: dict[int, str] = {}
    for token, number in vocab.items():
        if not token or SURROGATE.search(token):
            raise wrong(f"token {show(token)} must be some text, in valid Unicode")
        if type(number) is not int or not 0 <= number < _NEVER:
            raise wrong(
                f"token {show(token)} has id {show(number)}, not a whole number from 0 to "
                f"{_NEVER - 1}"
            )
        if owner.setdefault(number, token) != token:
            raise wrong(f"id {number} is both {show(owner[number])} and {show(token)}")
    ranks = {bytes([byte]): vocab[spelt] for spelt, byte in _BYTE_OF.items() if spelt in vocab}
    last = -1
    for merge in merges:
        match merge:
            case [str(left), str(right)] if {left, right, left + right} <= vocab.keys():
                token, number = left + right, vocab[left + right]
            case _:
                raise wrong(f"merge {show(merge)} is not two tokens that make a known third")
        if not _BYTE_OF.keys() >= set(token):
            raise wrong(f"merge {show(merge)} has a character that stands for no byte")
        if number <= last:
            raise wrong(f"merge {show(merge)} makes id {number} after {last}: ids must rise")
        ranks[bytes(_BYTE_OF[character] for character in token)] = last = number
    for merge, usual in zip(merges, find_merges(ranks, source), strict=True):
        if merge != usual:
            raise wrong(f"merge {show(merge)} cannot happen: earlier ones leave {show(usual)}")
    ordinary = set(map(spell, ranks))
    special = {token: number for token, number in vocab.items() if token not in ordinary}
    for token in special:
        if not set(token).isdisjoint(_STAND_INS.values()):
            raise wrong(f"token {show(token)} is a byte-level one that no merge makes")
    if (length := sum(map(len, special))) > _MOST_SPECIAL:  # tiktoken makes one pattern of them
        raise wrong(f"it has {length} characters of special tokens: at most {_MOST_SPECIAL}")
    if not ranks:
        raise wrong("the vocabulary has no byte: it must have one at least")
    return Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def find_merges(ranks: dict[bytes, int], source: str) -> list[list[str]]:
    """The merge that makes each longer token: the two parts that all earlier merges leave of it."""
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
