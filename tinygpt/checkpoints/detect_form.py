"""Which form a checkpoint is in, told by its content, and what each form calls GPT-2's parts.

Whatever the form, what comes out is the same: a configuration, and for each tensor that the model
needs where it lies and what it is to us. Nothing is read but headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import gguf_file, hub, safetensors_file, torch_file
from tinygpt.checkpoints.config_json import read_config as read_config_json
from tinygpt.checkpoints.stored_tensor import TensorInfo
from tinygpt.checkpoints.tensor_names import (
    BOOK,
    GGUF,
    HF,
    NANOGPT,
    Dialect,
    Entry,
    layout,
    weight_name,
)
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.storage import read_json

# Name without prefixes -> (file, where in it).
Tensors = dict[str, tuple[Path, TensorInfo]]
FLOATS = ("F64", "F32", "F16", "BF16")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Source: the GGUF specification; each after `gpt2.`.
_GGUF_KEYS = {
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
    "block_size": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_QKV_BIAS = re.compile(r"trf_blocks\.\d+\.att\.W_(query|key|value)\.bias")
_MOST_LAYERS, _MOST_POSITIONS = 256, 1 << 17  # far more than any GPT-2 has
_BOOK_HEAD_DIM = 64  # in all four sizes of GPT-2, and of the book


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk, whose tensors are the ones that its configuration asks for."""

    form: str  # "Hugging Face", "nanoGPT", "GGUF" or "book"
    config: GPTConfig
    layout: dict[str, Entry]
    tensors: Tensors


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a model's file, or of the files in its folder, and compare them.

    A folder holds `config.json` and `model.safetensors`, `pytorch_model.bin` or shards of either,
    or else a single file of another form. Of a file itself the first bytes tell the format, and the
    tensors' names the form.

    Raises:
        CheckpointError: when it is damaged, incomplete, dangerous, or not a GPT-2.
    """
    files = _weight_files(path)
    tensors, extra = _read_headers(files)
    form, dialect, config = _recognize(path, files[0], tensors, extra)
    # Before names are listed for each of a billion layers, and a cache is made that nothing bounds.
    most = min(_MOST_LAYERS, len(tensors) // 6)
    if config.n_layer > most:
        fact = (
            f"{len(tensors)} tensors, for {most} layers at most, but its configuration says n_layer"
        )
        raise CheckpointError(f"{path} has {fact} {show(config.n_layer)}")
    if config.position != "learned" and config.block_size > _MOST_POSITIONS:
        fact = f"{config.block_size} positions, where {_MOST_POSITIONS} are read at most"
        raise CheckpointError(f"{path} has {fact}")
    int8 = form == "Hugging Face" and any(info.dtype == "I8" for _, info in tensors.values())
    wanted = layout(config, dialect, int8)
    if form == "book":  # which leaves out the biases of query, key and value, by default
        wanted = {n: e for n, e in wanted.items() if n in tensors or not _QKV_BIAS.fullmatch(n)}
    _compare(path, form, wanted, {name: info for name, (_, info) in tensors.items()})
    tensors = {name: tensors[name] for name in wanted}
    taken, there = (sum(sizes) for sizes in (_sizes(tensors), map(_file_size, files)))
    if taken > 2 * there:  # torch's tensors may lie over one another: each of a thousand on a file
        raise CheckpointError(f"{path}: its tensors are {taken} bytes in files of {there}")
    return Checkpoint(form, config, wanted, tensors)


def _sizes(tensors: Tensors) -> list[int]:
    return [info.size_bytes for _, info in tensors.values()]


def _file_size(path: Path) -> int:
    return path.stat().st_size


def read_config(path: Path) -> GPTConfig:
    """The configuration of a model in any form: a folder or a file.

    Raises:
        CheckpointError: as from `open_checkpoint`.
    """
    return open_checkpoint(path).config


def _weight_files(path: Path) -> list[Path]:
    """The file or files with a model's tensors."""
    if not path.is_dir():
        return [path]
    for whole, index in hub.FILES:
        if (path / whole).is_file():
            return [path / whole]
        if (path / index).is_file():
            return [path / name for name in hub.shards(path / index)]
    try:
        others = [x for x in sorted(path.iterdir()) if x.suffix in _SUFFIXES and x.is_file()]
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    if len(others) == 1:
        return others
    names = ", ".join(name for pair in hub.FILES for name in pair)
    if others:
        found = ", ".join(x.name for x in others[:3])
        raise CheckpointError(f"{path}: none of {names}, but {found}: give the one file's path")
    raise CheckpointError(f"{path}: none of {names} is there")


def _read_headers(files: Sequence[Path]) -> tuple[Tensors, dict[str, Any]]:
    """Every tensor of some files, and what else the last of them says."""
    found: Tensors = {}
    extra: dict[str, Any] = {}
    for path in files:
        tensors, extra = _reader(path)(path)
        for name, info in tensors.items():
            name = weight_name(name)
            if name in found:
                raise CheckpointError(f"{path}: {show(name)} is also in {found[name][0].name}")
            found[name] = path, info
    return found, extra


def _reader(path: Path) -> Any:
    """The module function that reads the headers of a file's format, by its first bytes."""
    start = b""
    if path.is_file():  # opening a pipe would wait for a writer
        try:
            with open(path, "rb") as file:
                start = file.read(4)
        except OSError as error:
            raise CheckpointError(f"{path}: {reason(error)}") from error
    if start == gguf_file.MAGIC:
        return gguf_file.read_header
    if start in (b"PK\3\4", torch_file.OLD_START[:4]):
        return torch_file.read_header
    return safetensors_file.read_header


def _recognize(
    path: Path, file: Path, tensors: Tensors, extra: dict[str, Any]
) -> tuple[str, Dialect, GPTConfig]:
    """The form, its names, and the configuration; masks go from the tensors."""
    try:
        if _reader(file) is gguf_file.read_header:
            return "GGUF", GGUF, _gguf_config(tensors, extra)
        if isinstance(extra.get("model_args"), dict):
            _drop(tensors, NANOGPT)
            return "nanoGPT", NANOGPT, _nanogpt_config(tensors, extra["model_args"])
        if any(name.startswith("trf_blocks.") for name in tensors):
            _drop(tensors, BOOK)
            return "book", BOOK, _book_config(file, tensors)
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from error
    _drop(tensors, HF)
    folder = path if path.is_dir() else path.parent
    config = read_config_json(folder / "config.json")
    if config.tie_word_embeddings:  # then a head is a copy, which the model has no place for
        tensors.pop("lm_head.weight", None)
    return "Hugging Face", HF, config


def _drop(tensors: dict[str, Any], dialect: Dialect) -> None:
    for name in [name for name in tensors if re.fullmatch(dialect.ignored, name)]:
        del tensors[name]


def _nanogpt_config(tensors: Tensors, given: Mapping[str, Any]) -> GPTConfig:
    """Source: nanoGPT's `GPTConfig`; its `MLP` computes the exact GELU."""
    known = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    for name in known:
        if name not in given:
            raise InputError(f"its model_args have no {name}")
    shape = {name: given[name] for name in known}
    tied = _is_tied(tensors, NANOGPT)
    bias = given.get("bias", True)  # which the first checkpoints do not have
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


def _is_tied(tensors: Tensors, dialect: Dialect) -> bool:
    """Whether the output projection is the token embedding; a copy of it leaves the tensors.

    Such a copy is what nanoGPT and the book write, where the two are one parameter.
    """
    wte, head = (f"{dialect.names[part]}.weight" for part in ("wte", "lm_head"))
    if head in tensors and wte in tensors and _same_bytes(tensors[wte], tensors[head]):
        del tensors[head]
    return head not in tensors


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


def _compare(
    path: Path, form: str, wanted: dict[str, Entry], stored: dict[str, TensorInfo]
) -> None:
    """Refuse a model whose tensors are not the ones that its configuration asks for."""
    surplus = [show(name)[1:-1] for name in sorted(set(stored) - set(wanted))]
    source = "config.json" if form == "Hugging Face" else "its configuration"
    faults = []
    if missing := [name for name in wanted if name not in stored]:
        faults.append(f"missing {_some(missing)}")
    if surplus:
        faults.append(f"not part of the model: {_some(surplus)}")
    for name, entry in wanted.items():
        if name in stored and stored[name].shape != entry.shape:
            found, asked = show(stored[name].shape), show(entry.shape)
            faults.append(f"{name} is {found}, {source} asks for {asked}")
        allowed = (*FLOATS, *gguf_file.BLOCKS) if form == "GGUF" else FLOATS
        if name.removesuffix("weight") + "scale" in wanted and name.endswith("weight"):
            allowed = ("I8",)
        if name in stored and stored[name].dtype not in allowed:
            faults.append(f"{name} is {stored[name].dtype}, allowed are {', '.join(allowed)}")
    if faults:
        raise CheckpointError(f"{path}: {_some(faults, '; ')}")


def _some(names: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
