"""The vocabulary inside a GGUF file: from its metadata to a tokenizer and back.

Source: the GGUF specification, "Tokenizer", and llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.errors import CheckpointError, InputError, say, show
from tinygpt.storage import parse_json
from tinygpt.tokenizer import huggingface
from tinygpt.tokenizer.tokenizer import AddedToken, Tokenizer
from tinygpt.tokenizer.vocabulary import find_merges, spell

# The kinds of tokens in GGUF, and what llama.cpp's converter calls those that no text gives.
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
# Where the ends stand: of a text, of a turn in a talk, of a message. llama.cpp stops at each.
_ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
# What GGUF has no words for, as Hugging Face's files have it.
_KEPT = {f"tinygpt.{name}": f"{name}.json" for name in ("tokenizer_config", "generation_config")}


def tokenizer_from_metadata(metadata: Mapping[str, Any], path: Path) -> Tokenizer | None:
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
        config = _kept(metadata).get(huggingface.CONFIG)
        vocab, added = _used_tokens(tokens, metadata.get("tokenizer.ggml.token_type"))
        if config is None:
            config = _config(metadata, tokens, added)
        listed = added | huggingface.listed_in(config, str(path))
        return huggingface.assemble(vocab, merges, config, listed, str(path))
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _used_tokens(tokens: list[str], kinds: Any) -> tuple[dict[str, int], dict[str, AddedToken]]:
    """Token -> id, and which of them are added ones.

    Those that only fill the table up to the model's number of ids are left out.
    """
    kinds = kinds if isinstance(kinds, np.ndarray) else np.full(len(tokens), _NORMAL)
    vocab: dict[str, int] = {}
    added = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds.tolist(), strict=False)):
        if kind == _UNUSED:
            continue
        if vocab.setdefault(token, number) != number:
            raise InputError(f"its token {show(token)} is there twice")
        if kind in (_CONTROL, _USER):
            added[token] = AddedToken(token, number, kind == _CONTROL, normalized=kind == _USER)
    return vocab, added


def _config(
    metadata: Mapping[str, Any], tokens: list[str], added: Mapping[str, AddedToken]
) -> dict[str, Any]:
    """What `tokenizer_config.json` would hold."""
    config: dict[str, Any] = {}
    for role, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        known = type(number) is int and 0 <= number < len(tokens) and tokens[number] in added
        if number is not None:
            config[f"{role}_token"] = tokens[number] if known else None
    for flag in ("add_bos_token", "add_eos_token"):
        if isinstance(value := metadata.get(f"tokenizer.ggml.{flag}"), bool):
            config[flag] = value
    return config


def _kept(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that `metadata_of_tokenizer` has put in whole."""
    found = {}
    for key, name in _KEPT.items():
        if isinstance(text := metadata.get(key), str):
            try:
                found[name] = parse_json(text.encode())
            except ValueError as error:
                raise InputError(f"its {key}: {error}") from error
    return found


def ids_of_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """What a GGUF file says of a text's begin and end, by the names of Hugging Face's files.

    Raises:
        CheckpointError: when it says what no id can be.
    """
    ends = [number for key in _ENDS if type(number := metadata.get(key)) is int]
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    for name, theirs in (("bos", "bos"), ("pad", "padding")):
        if type(number := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is int:
            ids[f"{name}_token_id"] = number
    try:
        kept = _kept(metadata)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    generation = {name: kept[name] for name in ("generation_config.json",) if name in kept}
    for content in generation.values():  # the ids that stand in the open decide
        content["eos_token_id"] = ids["eos_token_id"]
    return {"config.json": ids, **generation}


def metadata_of_tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """A tokenizer as GGUF's metadata have it, padded with unused tokens to the model's ids.

    Args:
        tokenizer: None says that there is no vocabulary.
        vocab_size: how many ids the model knows. Tokens beyond have no place, which is said.
    Raises:
        InputError: for a tokenizer that is not a byte-level BPE.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    ranks, others = tokenizer.ranks, tokenizer.others
    merges = find_merges(ranks, tokenizer.name)
    names = {number: spell(token) for token, number in ranks.items()}
    if odd := {part for merge in merges for part in merge}.difference(names.values()):
        fact = f"has tokens of bytes such as {show(min(odd))} that are none themselves"
        raise InputError(f"tokenizer {tokenizer.name!r} {fact}, which GGUF's gpt2 cannot say")
    names |= {number: token for token, number in others.items()}
    kinds = dict.fromkeys(names, _NORMAL)  # which no merge makes, unless it is an added one
    kinds |= {each.id: _CONTROL if each.special else _USER for each in tokenizer.added}
    for number in sorted(number for number in names if number >= vocab_size):
        say(f"GGUF has as many tokens as the model: {show(names[number])} ({number}) is left out")
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [kinds.get(i, _UNUSED) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": bool(tokenizer.before),
    }
    if tokenizer.after:
        found["tokenizer.ggml.add_eos_token"] = True
    ends = [number for number in tokenizer.ends if 0 <= number < vocab_size]
    for number in ends[len(_ENDS) :]:
        say(f"GGUF has {len(_ENDS)} ends at most: {number} is left out")
    found |= dict(zip(_ENDS, ends, strict=False))
    for name, number in (("bos", tokenizer.start), ("unknown", tokenizer.eos)):
        if number is not None and 0 <= number < vocab_size:
            found[f"tokenizer.ggml.{name}_token_id"] = number
    says = {huggingface.CONFIG: huggingface.config_of(tokenizer)}
    if tokenizer.kept.get(huggingface.CONFIG) is None:
        del says[huggingface.CONFIG]  # all that there is to say is said above
    says |= {
        name: dict(tokenizer.kept[name])
        for name in _KEPT.values()
        if name in tokenizer.kept and name not in says
    }
    for key, name in _KEPT.items():
        if name in says:
            found[key] = json.dumps(says[name])
    return found
