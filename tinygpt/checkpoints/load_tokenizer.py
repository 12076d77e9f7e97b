"""The tokenizer that belongs to a model: by its name, in its folder, or inside its GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import gguf_file
from tinygpt.checkpoints.detect_form import file_format
from tinygpt.checkpoints.gguf_vocabulary import ids_of_metadata, tokenizer_from_metadata
from tinygpt.checkpoints.model_files import weight_files
from tinygpt.checkpoints.nanogpt_characters import META, nanogpt_characters
from tinygpt.checkpoints.run_folder import followed
from tinygpt.errors import CheckpointError, InputError, say, show, unknown
from tinygpt.storage import read_json
from tinygpt.tokenizer.encoding import (
    FILES,
    NAMES,
    file_tokenizer,
    folder_has_tokenizer,
    folder_tokenizer,
    is_tokenizer_file,
    named_tokenizer,
)
from tinygpt.tokenizer.tokenizer import Tokenizer

_CONFIG, GENERATION = "config.json", "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_tokenizer(name_or_path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of that name, or the one that a folder or a model's file brings.

    Args:
        name_or_path: `gpt2` (from tiktoken's cache, else downloaded), `bytes` (256 bytes and
            `<|endoftext|>`), a folder, a `tokenizer.json` or `vocab.json` of any name,
            nanoGPT's `meta.pkl`, or a model's file: a GGUF file's own, else what is in the file's
            folder. A Path is never a name.
        vocab_size: how many ids the model knows; a tokenizer with more ordinary tokens is refused.
            For a folder without a tokenizer, 50257 and nanoGPT's 50304 mean `gpt2`, and 257
            `bytes`.
    Raises:
        InputError: for an unknown name, a file that cannot be used, or too large a tokenizer.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in NAMES:
        if os.path.isdir(name):
            say(f"{name} is the tokenizer of that name; ./{name} is not it")
        return _fitting(named_tokenizer(name), name, vocab_size)
    path = followed(Path(name))
    if name and path.is_dir():
        file = None if folder_has_tokenizer(path) else _only_file(path)
    elif path.is_file() and path.suffix == ".pkl":
        return _fitting(nanogpt_characters(path), name, vocab_size)
    elif path.is_file() and is_tokenizer_file(path):
        return _fitting(file_tokenizer(path), name, vocab_size)
    elif path.is_file():
        file = path
    else:
        raise unknown("tokenizer", name, (*NAMES, f"a folder with {' or '.join(FILES)}"))
    is_gguf = file is not None and file_format(file) == "gguf"
    metadata = gguf_file.read_header(file)[1] if is_gguf else {}
    beside = folder_has_tokenizer(path.parent) or (path.parent / META).is_file()
    if file == path and not is_gguf and not beside:
        raise InputError(
            f"{name} is no tokenizer, and none is beside it: give {', '.join(NAMES)}, or a folder "
            f"with {' or '.join(FILES)}"
        )
    return model_tokenizer(path, metadata, vocab_size)


def model_tokenizer(
    path: Path,
    metadata: Mapping[str, Any],
    vocab_size: int | None,
    instead: str | Path | None = None,
) -> Tokenizer:
    """The tokenizer of a model whose header has been read; it ends a text where the model's end is.

    Args:
        path: the model's folder or file.
        metadata: of its GGUF file; empty for a model of another form.
        vocab_size: as for `load_tokenizer`.
        instead: another tokenizer than the model's own, as for `load_tokenizer`.
    Raises:
        InputError: as from `load_tokenizer`.
    """
    says = model_says(path, metadata)
    if instead:
        return with_files(load_tokenizer(instead, vocab_size), says)
    # A tokenizer that was put into the folder beside the model goes before the model's own.
    own = not path.is_dir() or not folder_has_tokenizer(path)
    tokenizer = tokenizer_from_metadata(metadata, path) if own else None
    if tokenizer is None:
        folder = path if path.is_dir() else path.parent
        if (meta := folder / META).is_file() and not folder_has_tokenizer(folder):
            tokenizer = nanogpt_characters(meta)
        else:
            tokenizer = folder_tokenizer(folder, vocab_size)
    return _fitting(with_files(tokenizer, says), str(path), vocab_size)


def with_files(tokenizer: Tokenizer, says: Mapping[str, Mapping[str, Any]]) -> Tokenizer:
    """The tokenizer with what a model's files say of it, in place of what it had of those files."""
    return replace(tokenizer, kept={**tokenizer.kept, **says})


def model_says(path: Path, metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a model's files say of its begin and end, by the names of Hugging Face's files.

    Args:
        path, metadata: as for `model_tokenizer`.
    Raises:
        CheckpointError: when they say what no id can be.
    """
    if metadata:
        return ids_of_metadata(metadata, path)
    folder, found = path if path.is_dir() else path.parent, {}
    for name in (_CONFIG, GENERATION):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        for key in _IDS:
            if not _are_ids(value := content.get(key)):
                fact = f"{folder / name}: {key} is {show(value)}"
                raise CheckpointError(f"{fact}: it must be an id, or for several ends a list")
        ends = content.get("eos_token_id")
        for number in ends if isinstance(ends, list) else [ends]:
            if number is not None and number < 0:
                say(f"{folder / name}: eos_token_id {show(number)} is no token, and ends no text")
        if name == _CONFIG:
            content = {key: content[key] for key in _IDS if key in content}
        found[name] = content
    return found


def _are_ids(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or all(type(each) is int for each in values)


def _only_file(folder: Path) -> Path | None:
    """The one file of a folder that is a whole model; None where there is no such one."""
    with suppress(CheckpointError):  # a folder may hold a tokenizer and no model
        files = weight_files(folder)
        return files[0] if len(files) == 1 else None
    return None


def _fitting(tokenizer: Tokenizer, name: str, vocab_size: int | None) -> Tokenizer:
    """The tokenizer, unless it has ordinary tokens that the model does not know.

    Added ones may lie outside: a pad token that the model never sees often does.
    """
    highest = max(tokenizer.ranks.values())
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"tokenizer {name!r} has ids up to {highest}, outside the model's vocabulary of "
            f"{vocab_size}: pass --tokenizer with the one it was trained with"
        )
    return tokenizer
