"""Opening a checkpoint: its name resolved once, its headers read once and compared, then used.

Whatever form it is in, what comes out is the same: a configuration, a tokenizer, and a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.checkpoints import gguf_file, hub
from tinygpt.checkpoints.adapter import Adapter, read_adapter
from tinygpt.checkpoints.detect_form import Tensors, read_headers, recognize
from tinygpt.checkpoints.load_tokenizer import model_says, model_tokenizer, with_files
from tinygpt.checkpoints.load_weights import load_weights
from tinygpt.checkpoints.model_files import weight_files
from tinygpt.checkpoints.quantization import check_dtype
from tinygpt.checkpoints.stored_tensor import TensorInfo
from tinygpt.checkpoints.tensor_names import (
    BOOK,
    GGUF,
    HUGGING_FACE,
    LINEAR,
    Dialect,
    ExpectedTensor,
    expected_tensors,
)
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, say, show
from tinygpt.model import GPT
from tinygpt.tokenizer.encoding import folder_has_tokenizer, ids_tokenizer
from tinygpt.tokenizer.tokenizer import Tokenizer

_FLOATS = ("F64", "F32", "F16", "BF16")
_QKV_BIAS = re.compile(r"trf_blocks\.\d+\.att\.(W_query|W_key|W_value|qkv)\.bias")
_MOST_LAYERS, _MOST_POSITIONS = 256, 1 << 17  # far more than any GPT-2 has


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk, whose tensors are the ones that its configuration asks for."""

    path: Path  # the folder or file that its name stands for
    config: GPTConfig
    expected: dict[str, ExpectedTensor]  # by the name in the file
    tensors: Tensors  # where each of those lies
    metadata: Mapping[str, Any]  # of a GGUF file; empty for other forms
    name: str  # what it was opened by
    adapter: Adapter | None = None  # what is added to the weights

    def tokenizer(self, instead: str | Path | None = None) -> Tokenizer:
        """The tokenizer that the model brings, or another.

        Args:
            instead: a name or path as for `load_tokenizer`; None takes the model's own.
        Raises:
            InputError: when there is none, it cannot be used, or it has more than the model knows.
        """
        if not instead and self.adapter and folder_has_tokenizer(self.adapter.folder):
            instead = self.adapter.folder  # which was trained together with it
        with hub.advice_if_fetched(self.path):
            return model_tokenizer(self.path, self.metadata, self.config.vocab_size, instead)

    def numbers(self) -> Tokenizer:
        """What stands for a tokenizer where none can be read: see `ids_tokenizer`."""
        says = model_says(self.path, self.metadata)
        return with_files(ids_tokenizer(self.config.vocab_size), says)

    def load(self, dtype: str | None = None, place: Callable[[GPT], None] | None = None) -> GPT:
        """The model itself, which brings its tokenizer: see `load_weights`."""
        with hub.advice_if_fetched(self.path):
            model = load_weights(self, dtype, place)
        model.name, model.tokenizer = self.name, self.tokenizer
        return model


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Read the headers of a model's file, or of the files in its folder, and compare them.

    A folder holds `config.json` and `model.safetensors`, `pytorch_model.bin` or shards of either,
    or else a single file of another form. Of a file itself the first bytes tell the format, and the
    tensors' names the form.

    Args:
        name_or_path: a folder, a file, or a name on the Hugging Face Hub: see `hub.resolve`. Of a
            LoRA adapter, the model that it names is opened with the adapter's changes.
    Raises:
        InputError: when it cannot be found or fetched.
        CheckpointError: when it is damaged, incomplete, dangerous, or not a GPT-2.
    """
    name, path = os.fspath(name_or_path), hub.resolve(name_or_path)
    with hub.advice_if_fetched(path):
        adapter = read_adapter(path)
        if adapter is None:
            return _open(name, path)
    base = adapter.base()
    say(f"{adapter.folder} is an adapter: merged into {base}")
    with hub.advice_if_fetched(base):
        return _open(name, base, adapter)


def _open(name: str, path: Path, adapter: Adapter | None = None) -> Checkpoint:
    """Read the headers of a model's files, with an adapter over it or without."""
    files = weight_files(path)
    headers = read_headers(files)
    dialect, config, tensors = recognize(path, files[0], headers)
    if adapter:
        config, tensors = adapter.onto(dialect, config, tensors)
        files = [*files, *{file for file, _ in adapter.replaced.values()}]
    _need_plausible(path, config, len(tensors))
    int8 = dialect is HUGGING_FACE and any(info.dtype == "I8" for _, info in tensors.values())
    expected = expected_tensors(config, dialect, int8)
    if dialect.form == BOOK.form:  # its models have no biases of query, key and value by default
        left_out = {name for name in expected.keys() - tensors.keys() if _QKV_BIAS.fullmatch(name)}
        expected = {name: tensor for name, tensor in expected.items() if name not in left_out}
    if adapter:
        adapter.check(expected)
    _compare(path, dialect, expected, {name: info for name, (_, info) in tensors.items()})
    tensors = {name: tensors[name] for name in expected}
    taken = sum(info.size_bytes for _, info in tensors.values())
    there = sum(file.stat().st_size for file in files)
    # In torch's form tensors may share bytes: a thousand could each be as large as the file.
    if taken > 2 * there:
        raise CheckpointError(f"{path}: its tensors are {taken} bytes in files of {there}")
    metadata = headers.extra if headers.format == "gguf" else {}
    return Checkpoint(path, config, expected, tensors, metadata, name, adapter)


def load_pretrained(name_or_path: str | Path, dtype: str | None = None) -> GPT:
    """Load a GPT-2 checkpoint of any form, in one go: see `open_checkpoint` and `load_weights`.

    Raises:
        InputError: for a dtype that is none, before anything is fetched; and as from those two.
    """
    if dtype is not None:
        check_dtype(dtype)
    return open_checkpoint(name_or_path).load(dtype)


def _need_plausible(path: Path, config: GPTConfig, tensor_count: int) -> None:
    """Refuse what would list names for a billion layers, or make a cache that nothing bounds."""
    most = min(_MOST_LAYERS, tensor_count // 6)
    if config.n_layer > most:
        raise CheckpointError(
            f"{path} has {tensor_count} tensors, for {most} layers at most, but its configuration "
            f"says n_layer {show(config.n_layer)}"
        )
    if config.position != "learned" and config.block_size > _MOST_POSITIONS:
        raise CheckpointError(
            f"{path} has {config.block_size} positions, where {_MOST_POSITIONS} are read at most"
        )


def _compare(
    path: Path,
    dialect: Dialect,
    expected: dict[str, ExpectedTensor],
    stored: dict[str, TensorInfo],
) -> None:
    """Refuse a model whose tensors are not the ones that its configuration asks for."""
    faults = []
    if missing := [name for name in expected if name not in stored]:
        faults.append(f"missing {_some(missing)}")
    if surplus := [show(name)[1:-1] for name in sorted(set(stored) - set(expected))]:
        faults.append(f"not part of the model: {_some(surplus)}")
    source = "config.json" if dialect in (HUGGING_FACE, LINEAR) else "its configuration"
    for name in (name for name in expected if name in stored):
        info, asked = stored[name], expected[name].shape
        if info.shape != asked:
            faults.append(f"{name} is {show(info.shape)}, {source} asks for {show(asked)}")
        allowed = _allowed_dtypes(name, dialect, expected)
        if info.dtype not in allowed:
            faults.append(f"{name} is {info.dtype}, allowed are {', '.join(allowed)}")
    if faults:
        raise CheckpointError(f"{path}: {_some(faults, '; ')}")


def _allowed_dtypes(
    name: str, dialect: Dialect, expected: dict[str, ExpectedTensor]
) -> tuple[str, ...]:
    """The types that a tensor may be stored in, int8 where a scale is expected beside it."""
    if name.endswith("weight") and name.removesuffix("weight") + "scale" in expected:
        return ("I8",)
    return (*_FLOATS, *gguf_file.BLOCKS) if dialect is GGUF else _FLOATS


def _some(names: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
