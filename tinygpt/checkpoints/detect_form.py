"""Which form a checkpoint is in, told by its content, and the configuration that the form gives it.

Nothing is read but headers, and where an output projection may be a copy of the token embedding,
those two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import config_json, gguf_file, safetensors_file, torch_file
from tinygpt.checkpoints.stored_tensor import TensorInfo
from tinygpt.checkpoints.tensor_names import (
    BOOK,
    GGUF,
    HUGGING_FACE,
    NANOGPT,
    Dialect,
    weight_name,
)
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.storage import read_json

# Name without prefixes -> (file, where in it).
Tensors = dict[str, tuple[Path, TensorInfo]]
# Our field -> GGUF's key after `gpt2.`. Source: the GGUF specification.
_GGUF_KEYS = {
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
    "block_size": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_BOOK_HEAD_DIM = 64  # the same in all four sizes of GPT-2, in the book too


@dataclass(frozen=True)
class Headers:
    """What the headers of a model's files say, before anything in them is believed."""

    format: str  # "gguf", "torch" or "safetensors"
    tensors: Tensors
    extra: dict[str, Any]  # GGUF's metadata; what torch saved beside the tensors


def file_format(path: Path) -> str:
    """The format of a file by its first bytes: "gguf", "torch", else "safetensors".

    Raises:
        CheckpointError: when it cannot be read.
    """
    start = b""
    if path.is_file():  # opening a pipe would wait for a writer
        try:
            with open(path, "rb") as file:
                start = file.read(4)
        except OSError as error:
            raise CheckpointError(f"{path}: {reason(error)}") from error
    if start == gguf_file.MAGIC:
        return "gguf"
    return "torch" if start in (b"PK\3\4", torch_file.OLD_START[:4]) else "safetensors"


def read_headers(files: Sequence[Path]) -> Headers:
    """Every tensor of a model's files, and what else the last of them says.

    Raises:
        CheckpointError: when a header is damaged, or two files have a tensor of the same name.
    """
    readers = {"gguf": gguf_file, "torch": torch_file, "safetensors": safetensors_file}
    found: Tensors = {}
    for path in files:
        form = file_format(path)
        tensors, extra = readers[form].read_header(path)
        for name, info in tensors.items():
            name = weight_name(name)
            if name in found:
                raise CheckpointError(f"{path}: {show(name)} is also in {found[name][0].name}")
            found[name] = path, info
    return Headers(form, found, extra)


def recognize(path: Path, file: Path, headers: Headers) -> tuple[Dialect, GPTConfig, Tensors]:
    """A model's form, its configuration, and its tensors without masks and tied copies.

    Args:
        path: the model's folder or file.
        file: the first file with its tensors.
    Raises:
        CheckpointError: when the configuration is missing, damaged or not of a GPT-2.
    """
    extra = headers.extra
    try:
        if headers.format == "gguf":
            tensors = drop_tied_copy(headers.tensors, GGUF)
            return GGUF, _gguf_config(tensors, extra), tensors
        if isinstance(extra.get("model_args"), dict):
            tensors = drop_tied_copy(_without_masks(headers.tensors, NANOGPT), NANOGPT)
            return NANOGPT, _nanogpt_config(tensors, extra["model_args"]), tensors
        if any(name.startswith("trf_blocks.") for name in headers.tensors):
            tensors = drop_tied_copy(_without_masks(headers.tensors, BOOK), BOOK)
            return BOOK, _book_config(file, tensors), tensors
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from error
    tensors = _without_masks(headers.tensors, HUGGING_FACE)
    folder = path if path.is_dir() else path.parent
    config = config_json.read_config(folder / "config.json")
    if config.tie_word_embeddings:  # then a head is a copy, and the model has no place for it
        tensors.pop("lm_head.weight", None)
    return HUGGING_FACE, config, tensors


def _without_masks(tensors: Tensors, dialect: Dialect) -> Tensors:
    """The tensors that are weights."""
    ignored = re.compile(dialect.ignored)
    return {name: place for name, place in tensors.items() if not ignored.fullmatch(name)}


def _is_tied(tensors: Tensors, dialect: Dialect) -> bool:
    """Whether the output projection is the token embedding, once a copy of it is dropped."""
    return f"{dialect.names['lm_head']}.weight" not in tensors


def drop_tied_copy(tensors: Tensors, dialect: Dialect) -> Tensors:
    """The tensors without an output projection whose bytes are those of the token embedding.

    nanoGPT and the book write such a copy, where the two are one parameter.
    """
    wte, head = (f"{dialect.names[part]}.weight" for part in ("wte", "lm_head"))
    if head in tensors and wte in tensors and _same_bytes(tensors[wte], tensors[head]):
        return {name: place for name, place in tensors.items() if name != head}
    return dict(tensors)


def _nanogpt_config(tensors: Tensors, given: Mapping[str, Any]) -> GPTConfig:
    """Source: nanoGPT's `GPTConfig`; its `MLP` computes the exact GELU."""
    known = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    for name in known:
        if name not in given:
            raise InputError(f"its model_args have no {name}")
    shape = {name: given[name] for name in known}
    tied = _is_tied(tensors, NANOGPT)
    bias = given.get("bias", True)  # the first checkpoints do not say
    return GPTConfig(**shape, bias=bias, activation="gelu", tie_word_embeddings=tied)


def _book_config(file: Path, tensors: Tensors) -> GPTConfig:
    """Source: the book's chapter 4; the number of heads leaves no trace in the tensors."""
    (vocab_size, n_embd), (block_size, _) = (
        _shape(tensors, name, 2) for name in ("tok_emb.weight", "pos_emb.weight")
    )
    inner, _ = _shape(tensors, "trf_blocks.0.ff.layers.0.weight", 2)
    numbers = {int(n) for name in tensors for n in re.findall(r"^trf_blocks\.(\d{1,9})\.", name)}
    beside = file.parent / "config.json"
    n_head = read_json(beside).get("n_head") if beside.is_file() else None
    if n_head is None and n_embd % _BOOK_HEAD_DIM == 0:
        n_head = n_embd // _BOOK_HEAD_DIM
    elif n_head is None:
        raise InputError(
            f"the number of heads is not in the file, and at width {n_embd} not GPT-2's: put a "
            'config.json with {"n_head": N} beside it'
        )
    return GPTConfig(
        n_layer=len(numbers),
        n_head=n_head,
        n_embd=n_embd,
        block_size=block_size,
        vocab_size=vocab_size,
        n_inner=None if inner == 4 * n_embd else inner,
        tie_word_embeddings=_is_tied(tensors, BOOK),
    )


def _gguf_config(tensors: Tensors, metadata: Mapping[str, Any]) -> GPTConfig:
    """Source: the GGUF specification's keys; llama.cpp's GPT-2 computes GELU by its tanh form."""
    plain = {k: v for k, v in metadata.items() if isinstance(v, str | int | float)}
    if (name := plain.get("general.architecture")) != "gpt2":
        raise InputError(f"its architecture is {show(name)}: only gpt2 can be loaded")
    if plain.get("split.count", 1) != 1:
        raise InputError("it is one of several parts: join them with llama.cpp's gguf-split first")
    given = {ours: plain.get(f"gpt2.{theirs}") for ours, theirs in _GGUF_KEYS.items()}
    if missing := [_GGUF_KEYS[name] for name, value in given.items() if value is None]:
        raise InputError(f"its metadata have no number gpt2.{missing[0]}")
    given["vocab_size"], width = _shape(tensors, "token_embd.weight", 2)
    inner = plain.get("gpt2.feed_forward_length")
    n_inner = None if inner == 4 * width else inner
    return GPTConfig(**given, n_inner=n_inner, tie_word_embeddings=_is_tied(tensors, GGUF))


def _shape(tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"missing {name}")
    shape = tensors[name][1].shape
    if len(shape) != rank:
        raise InputError(f"{name} is {show(shape)}: it must have {rank} axes")
    return shape


def _same_bytes(one: tuple[Path, TensorInfo], other: tuple[Path, TensorInfo]) -> bool:
    infos = one[1], other[1]
    if len({(info.dtype, info.shape, info.strides, info.size_bytes) for info in infos}) > 1:
        return False
    step = 1 << 20
    with open(one[0], "rb") as first, open(other[0], "rb") as second:
        for at in range(0, infos[0].size_bytes, step):
            size = min(step, infos[0].size_bytes - at)
            first.seek(infos[0].start + at)
            second.seek(infos[1].start + at)
            if first.read(size) != second.read(size):
                return False
    return True
