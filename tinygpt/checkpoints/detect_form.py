"""Which form a checkpoint is in, told by its content, and the configuration that the form gives it.

Nothing is read but headers, and where an output projection may be a copy of the token embedding,
those two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import config_json, gguf_file, other_files, safetensors_file, torch_file
from tinygpt.checkpoints.pickled_names import Record
from tinygpt.checkpoints.stored_tensor import TensorInfo
from tinygpt.checkpoints.tensor_names import (
    BOOK,
    GGUF,
    HUGGING_FACE,
    LINEAR,
    NANOGPT,
    Dialect,
    book_dialect,
    owner,
    weight_name,
)
from tinygpt.config import Activation, GPTConfig
from tinygpt.errors import CheckpointError, InputError, reason, say, show
from tinygpt.storage import open_plain, read_json

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
# What the programs of nanoGPT's kind save of a model's shape.
_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# What stands in a language model's place, and heads beside one, which say so or estimate values.
_CLASSIFIER = re.compile(
    r"(score|classifier|qa_outputs|(cls|classifier|classification|score|qa)_head)\.[\w.]{1,100}"
)
_BESIDE = re.compile(
    r"((v|values?|q|target_q|ilql|reward|cost|critic|frozen|medusa|multiple_choice|mc)_heads?"
    r"|critic|value|reward)\..*"
)
# One of another name; with a row for each token it may be the language model's own.
_OTHER_HEAD = re.compile(r"(?!lm_|out_)\w{1,100}_heads?\..*")


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
    try:
        with open_plain(path) as file:
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
        if form == "safetensors" and (what := other_files.of_file(path)):
            raise CheckpointError(f"{path}: it is {what}")
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
        tensors = _language_model(file, _without_owner(headers.tensors))
        if settings := _settings(extra):
            tensors = drop_tied_copy(_without_masks(tensors, NANOGPT), NANOGPT)
            return NANOGPT, _nanogpt_config(tensors, *settings), tensors
        if any(name.startswith("trf_blocks.") for name in tensors):
            dialect = book_dialect(tensors)
            tensors = drop_tied_copy(_without_masks(tensors, dialect), dialect)
            return dialect, _book_config(file, tensors), tensors
        folder = path if path.is_dir() else path.parent
        return _by_config_json(folder / "config.json", tensors)
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _by_config_json(path: Path, tensors: Tensors) -> tuple[Dialect, GPTConfig, Tensors]:
    """The form of a model whose configuration lies beside it, by which way its matrices lie."""
    # GPT-2's is (in, out), and three times as wide as it is high.
    place = tensors.get("h.0.attn.c_attn.weight")
    is_linear = place is not None and len(s := place[1].shape) == 2 and s[0] == 3 * s[1]
    dialect = LINEAR if is_linear else HUGGING_FACE
    tensors = _without_masks(tensors, dialect)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_which_config(tensors, is_linear)}")
    # minGPT leaves a file of that name, too, which is of another kind.
    if is_linear and not {"n_head", "num_attention_heads"} & read_json(path).keys():
        raise CheckpointError(f"{path}: it has no n_head{_which_config(tensors, is_linear)}")
    config = config_json.read_config(path)
    if is_linear:
        tensors = drop_tied_copy(tensors, dialect)
        tied, bias = _is_tied(tensors, dialect), "ln_f.bias" in tensors
        return dialect, replace(config, tie_word_embeddings=tied, bias=bias), tensors
    if config.tie_word_embeddings:  # then a head is a copy, and the model has no place for it
        tensors.pop("lm_head.weight", None)
    return dialect, config, tensors


def _which_config(tensors: Tensors, is_linear: bool) -> str:
    """What the missing `config.json` has to say, as far as the tensors tell."""
    parts = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")
    if not all(name in tensors and len(tensors[name][1].shape) == 2 for name in parts):
        return f", and its tensors ({show(sorted(tensors)[:3])[1:-1]}) are not named as a GPT-2's"
    (vocab_size, n_embd), (block_size, _), inner = (tensors[name][1].shape for name in parts)
    numbers = {int(n) for name in tensors for n in re.findall(r"^h\.(\d{1,9})\.", name)}
    config = {
        "n_layer": len(numbers),
        "n_head": "N",
        "n_embd": n_embd,
        "n_positions": block_size,
        "vocab_size": vocab_size,
    }
    if (n_inner := inner[0 if is_linear else 1]) != 4 * n_embd:
        config["n_inner"] = n_inner
    if is_linear:
        config["activation_function"] = "gelu_new"
    text = json.dumps(config).replace('"N"', "N")
    other = ' (nanoGPT since June 2023: "gelu")' if is_linear else ""
    return f": write one with {text}{other}, N being its number of heads"


def _without_owner(tensors: Tensors) -> Tensors:
    """The tensors without what all names of the language model have before them: see `owner`."""
    prefix = owner(tensors)
    found: Tensors = {}
    for name, place in tensors.items():
        name = weight_name(name[len(prefix) :]) if name.startswith(prefix) else name
        if name in found:
            raise InputError(f"{show(name)} is there twice, with {show(prefix)} before it and not")
        found[name] = place
    return found


def _language_model(file: Path, tensors: Tensors) -> Tensors:
    """The tensors without those of heads that stand beside a language model, which are named."""
    if found := [name for name in tensors if _CLASSIFIER.fullmatch(name)]:
        raise InputError(f"it is a classifier ({found[0]}): only language models can be loaded")
    embedding = tensors.get("wte.weight") or tensors.get("tok_emb.weight")
    rows = embedding[1].shape[0] if embedding and embedding[1].shape else None
    if beside := [
        name
        for name, (_, info) in tensors.items()
        if _BESIDE.fullmatch(name) or (_OTHER_HEAD.fullmatch(name) and rows not in info.shape)
    ]:
        names = ", ".join(show(name)[1:-1] for name in beside[:4])
        more = f" and {len(beside) - 4} more" if len(beside) > 4 else ""
        say(f"left out of {file}: {names}{more}, beside the language model")
    return {name: place for name, place in tensors.items() if name not in beside}


def _settings(extra: Mapping[str, Any]) -> tuple[str, dict[str | int, Any]] | None:
    """What a program of nanoGPT's kind saved beside the weights: under which key, and its fields.

    nanoGPT has a dict `model_args`, and build-nanogpt an object `config`.
    """
    for key in ("model_args", "config"):
        given = extra.get(key)
        given = given.fields if isinstance(given, Record) else given
        if isinstance(given, dict) and (key == "model_args" or given.keys() >= set(_SHAPE)):
            return key, given
    return None


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


def _nanogpt_config(tensors: Tensors, key: str, given: Mapping[str | int, Any]) -> GPTConfig:
    """Source: `GPTConfig` and `MLP` of nanoGPT and build-nanogpt."""
    for name in _SHAPE:
        if name not in given:
            raise InputError(f"its {key} have no {name}")
    shape = {name: given[name] for name in _SHAPE}
    bias = given.get("bias", "ln_f.bias" in tensors)
    # nanoGPT computes the exact GELU; build-nanogpt and nanoGPT's first months, whose checkpoints
    # do not speak of biases, GPT-2's.
    activation: Activation = "gelu" if key == "model_args" and "bias" in given else "gelu_tanh"
    tied = _is_tied(tensors, NANOGPT)
    return GPTConfig(**shape, bias=bias, activation=activation, tie_word_embeddings=tied)


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
    with open_plain(one[0]) as first, open_plain(other[0]) as second:
        for at in range(0, infos[0].size_bytes, step):
            size = min(step, infos[0].size_bytes - at)
            first.seek(infos[0].start + at)
            second.seek(infos[1].start + at)
            if first.read(size) != second.read(size):
                return False
    return True
