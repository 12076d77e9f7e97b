"""The vocabulary inside a GGUF file: from its metadata to a tokenizer and back.

Source: the GGUF specification, "Tokenizer", and llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.errors import CheckpointError, InputError, show
from tinygpt.tokenizer.vocabulary import END, find_merges, from_merges, spell

if TYPE_CHECKING:  # imported only where text is handled, which is rare
    from tiktoken import Encoding

# The kinds of tokens in GGUF, and what llama.cpp's converter calls those that no text gives.
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def tokenizer_from_metadata(metadata: Mapping[str, Any], path: Path) -> Encoding | None:
    """The tokenizer that a GGUF file brings; None for a file without one.

    Args:
        metadata: as from `gguf_file.read_header`.
        path: of the file, for the error.
    Raises:
        CheckpointError: when it is damaged, or not of GPT-2's form.
    """
    found = {x: metadata.get(f"tokenizer.ggml.{x}") for x in ("model", "pre", "tokens", "merges")}
    try:
        match found:
            case {"model": None | "no_vocab"}:
                return None
            case {"model": "gpt2", "pre": None | "default" | "gpt-2", "tokens": list(tokens)}:
                merges = found["merges"] if isinstance(found["merges"], list) else []
            case _:
                raise InputError(f"its tokenizer is {show(found)}: it must be gpt2's")
        kinds = metadata.get("tokenizer.ggml.token_type")
        return from_merges(_used_tokens(tokens, kinds), merges, str(path))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _used_tokens(tokens: list[str], kinds: Any) -> dict[str, int]:
    """Token -> id, without those that only fill the table up to the model's number of ids."""
    unused = np.flatnonzero(kinds == _UNUSED) if isinstance(kinds, np.ndarray) else ()
    vocab: dict[str, int] = {}
    for number in sorted(set(range(len(tokens))).difference(unused)):
        if vocab.setdefault(tokens[number], number) != number:
            raise InputError(f"its token {show(tokens[number])} is there twice")
    return vocab


def metadata_of_tokenizer(tokenizer: Encoding | None, vocab_size: int) -> dict[str, Any]:
    """A tokenizer as GGUF's metadata have it, padded with unused tokens to the model's ids.

    Args:
        tokenizer: None says that there is no vocabulary.
        vocab_size: how many ids the model knows.
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
