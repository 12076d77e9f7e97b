"""The tokenizer that belongs to a model: by its name, in its folder, or inside its GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.checkpoints import gguf_file
from tinygpt.checkpoints.detect_form import file_format
from tinygpt.checkpoints.gguf_vocabulary import tokenizer_from_metadata
from tinygpt.checkpoints.model_files import weight_files
from tinygpt.errors import CheckpointError, InputError, unknown
from tinygpt.tokenizer.encoding import (
    FILES,
    NAMES,
    folder_has_tokenizer,
    folder_tokenizer,
    named_tokenizer,
)

if TYPE_CHECKING:
    from tiktoken import Encoding


def load_tokenizer(name_or_path: str | Path, vocab_size: int | None = None) -> Encoding:
    """The tokenizer of that name, or the one that a folder or a model's file brings.

    Args:
        name_or_path: `gpt2` (from tiktoken's cache, else downloaded), `bytes` (256 bytes and
            `<|endoftext|>`), a folder, or a model's file: a GGUF file's own, else what is in the
            file's folder. A Path is never a name.
        vocab_size: how many ids the model knows; a tokenizer with more is refused. For a folder
            without a tokenizer, 50257 and nanoGPT's 50304 mean `gpt2`, and 257 `bytes`.
    Raises:
        InputError: for an unknown name, a file that cannot be used, or too large a tokenizer.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in NAMES:
        return _fitting(named_tokenizer(name), name, vocab_size)
    path = Path(name)
    if os.path.isdir(name):
        file = None if folder_has_tokenizer(path) else _only_file(path)
    elif os.path.isfile(name):
        file = path
    else:
        raise unknown("tokenizer", name, (*NAMES, f"a folder with {' or '.join(FILES)}"))
    is_gguf = file is not None and file_format(file) == "gguf"
    metadata = gguf_file.read_header(file)[1] if is_gguf else {}
    return model_tokenizer(path, metadata, vocab_size)


def model_tokenizer(path: Path, metadata: Mapping[str, Any], vocab_size: int | None) -> Encoding:
    """The tokenizer of a model whose header has been read.

    Args:
        path: the model's folder or file.
        metadata: of its GGUF file; empty for a model of another form.
        vocab_size: as for `load_tokenizer`.
    Raises:
        InputError: as from `load_tokenizer`.
    """
    # A tokenizer that was put into the folder beside the model goes before the model's own.
    own = not path.is_dir() or not folder_has_tokenizer(path)
    tokenizer = tokenizer_from_metadata(metadata, path) if own else None
    if tokenizer is None:
        tokenizer = folder_tokenizer(path if path.is_dir() else path.parent, vocab_size)
    return _fitting(tokenizer, str(path), vocab_size)


def _only_file(folder: Path) -> Path | None:
    """The one file of a folder that is a whole model; None where there is no such one."""
    with suppress(CheckpointError):  # a folder may hold a tokenizer and no model
        files = weight_files(folder)
        return files[0] if len(files) == 1 else None
    return None


def _fitting(tokenizer: Encoding, name: str, vocab_size: int | None) -> Encoding:
    """The tokenizer, unless it has ids that the model does not know."""
    if vocab_size is not None and tokenizer.n_vocab > vocab_size:
        raise InputError(
            f"tokenizer {name!r} has ids up to {tokenizer.n_vocab - 1}, outside the model's "
            f"vocabulary of {vocab_size}: pass --tokenizer with the one it was trained with"
        )
    return tokenizer
