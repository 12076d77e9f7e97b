"""Checkpoints on the disk <-> our model: reading any form in `formats`, writing two of them.

A folder in Hugging Face form is what a model is kept in; a GGUF file is for llama.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tinygrad import Device
from tinygrad.nn.state import get_state_dict

from tinygpt.checkpoints import config_json, gguf_file, hub, safetensors_file
from tinygpt.checkpoints.detect_form import Checkpoint, open_checkpoint
from tinygpt.checkpoints.quantization import (
    DTYPES,
    check_dtype,
    dtype_of,
    matrices,
    set_weight,
    supported,
    widened,
)
from tinygpt.checkpoints.stored_tensor import TensorInfo, read_tensor
from tinygpt.checkpoints.tensor_names import GGUF, HF, Entry, layout
from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, InputError, reason, unknown
from tinygpt.model import GPT
from tinygpt.ops.fast import widen
from tinygpt.runtime import buffers, memory
from tinygpt.storage import LONG_BYTES, atomic_file, byte_bar
from tinygpt.tokenizer.vocabulary import gguf_metadata

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tinygrad.helpers import tqdm

_LOADERS = 2  # tensors that are read and turned at a time
# What the model holds a matrix in that is stored so; any other, float32.
_HELD = {"F16": "float16", "BF16": "bfloat16", "I8": "int8"}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
# GGUF's type for a matrix of each of ours: int8 there has a scale for each 32 numbers.
GGUF_TYPES = {"float32": "F32", "float16": "F16", "int8": "Q8_0"}
# What llama.cpp's GPT-2 always has.
_GGUF_FIXED = ("norm", "position", "activation", "shortcut", "scale_attn_weights",
               "scale_attn_by_inverse_layer_idx")  # fmt: skip


def load_pretrained(name_or_path: str | Path, dtype: str | None = None) -> GPT:
    """Load a GPT-2 checkpoint, in any form that `forms.open_checkpoint` tells apart.

    Args:
        name_or_path: a folder, a file, or a name on the Hugging Face Hub: see `hub.resolve`.
        dtype: what to hold matrices in, one of `precision.DTYPES`; None takes what each is stored
            in, or float32 where that is made of blocks or the backend cannot.
    Raises:
        InputError: when it cannot be found, fetched or held in memory.
        CheckpointError: when it is damaged, incomplete, or not a GPT-2.
    """
    if dtype is not None:
        check_dtype(dtype)
    path = hub.resolve(name_or_path)
    found = open_checkpoint(path)
    held = {name: dtype or _as_stored(info.dtype) for name, (_, info) in found.tensors.items()}
    _require_memory(path, found, held)
    model = GPT(found.config, seed=None)
    parameters, layers = get_state_dict(model), matrices(model)
    scales = {e.ours[0]: name for name, e in found.layout.items() if e.ours[0].endswith(".scale")}
    names = [name for name in found.layout if name not in scales.values()]  # read with weights
    sizes = {name: found.tensors[name][1].size_bytes for name in names}
    missing = set(parameters)

    def load(name: str) -> None:
        entry, (file, info) = found.layout[name], found.tensors[name]
        parts = _parts(path, name, read_tensor(file, info), entry, info)
        if not found.config.bias and entry.ours[0] not in parameters:
            if any(part.any() for part in parts):
                raise CheckpointError(f"{path}: {name} is not zero, but config.json says no bias")
            return
        scale_name = scales.get(entry.ours[0].removesuffix("weight") + "scale")
        pieces = [None] * len(parts)
        if scale_name:
            info = found.tensors[scale_name]
            pieces = _parts(path, scale_name, read_tensor(*info), found.layout[scale_name], info[1])
        for our_name, part, scale in zip(entry.ours, parts, pieces, strict=True):
            if layer := layers.get(our_name.removesuffix(".weight")):
                try:
                    set_weight(layer, part, held[name], name, scale)
                except InputError as error:
                    raise CheckpointError(f"{path}: {error}") from error
            else:
                buffers.write(parameters[our_name], part.astype(np.float32, copy=False))
            missing.discard(our_name)

    # tinygrad computes what is in blocks, and a GPU's driver may know one thread only.
    alone = any(info.dtype in gguf_file.BLOCKS for _, info in found.tensors.values())
    threads = 1 if alone or Device.DEFAULT != "CPU" else _LOADERS
    _each(load, sizes, threads, byte_bar(f"reading {path.name}", sum(sizes.values()), LONG_BYTES))
    for our_name in missing:  # biases of query, key and value that the book's form leaves out
        buffers.write(parameters[our_name], np.zeros(parameters[our_name].shape, np.float32))
    return model


def _each(load: Callable[[str], None], sizes: Mapping[str, int], threads: int, bar: tqdm) -> None:
    """Load every name, on some threads or on this one; after an error, read no further."""
    with bar, ThreadPoolExecutor(threads) as pool:
        loaded = (map if threads == 1 else pool.map)(load, sizes)
        for size_bytes, _ in zip(sizes.values(), loaded, strict=True):
            bar.update(size_bytes)


def _require_memory(path: Path, found: Checkpoint, held: dict[str, str]) -> None:
    """Refuse what cannot fit, by the headers alone."""
    size_bytes = sum(
        math.prod(entry.shape) * DTYPES[held[name]].itemsize for name, entry in found.layout.items()
    )
    # Of each tensor on its way there are its bytes as stored, and as read; to round it, two more.
    largest = max(
        (12 if held[name] == "int8" else 4) * math.prod(found.layout[name].shape) + info.size_bytes
        for name, (_, info) in found.tensors.items()
    )
    memory.require_memory(size_bytes + _LOADERS * largest, f"the model in {path}")


def _parts(
    path: Path, name: str, raw: np.ndarray, entry: Entry, info: TensorInfo
) -> list[np.ndarray]:
    """What one of their tensors holds of ours, every number checked to be one."""
    array = gguf_file.dequantize(raw, info) if info.dtype in gguf_file.BLOCKS else raw
    with np.errstate(all="ignore"):
        if info.dtype == "F64":  # of which float32 does not hold the largest
            array = array.astype(np.float32)
        # NaN is the largest and the smallest of all numbers to NumPy
        finite = array.size == 0 or np.isfinite([array.max(), array.min()]).all()
    if not finite:
        raise CheckpointError(f"{path}: {name} has values that are infinite or not a number")
    return np.split(array.T if entry.transposed else array, len(entry.ours))


def _as_stored(dtype: str) -> str:
    held = _HELD.get(dtype, "float32")
    return held if supported(held) else "float32"


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, each whole or not at all, weights as held.

    `transformers` loads the folder as a GPT-2 with equal logits. A model that GPT-2's form cannot
    express (post-norm, sinusoidal positions, no shortcuts, int8) is marked as model_type "tinygpt",
    which `transformers` refuses by name and `load_pretrained` reads.

    Raises:
        InputError: when the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {reason(error)}") from error
    parameters, layers, dtype = get_state_dict(model), matrices(model), dtype_of(model.wte)
    entries = {
        name if name.startswith("lm_head") else f"transformer.{name}": entry
        for name, entry in layout(model.config, HF, dtype == "int8").items()
    }

    def stored_as(ours: str) -> str:
        layer = layers.get(ours.removesuffix(".weight"))
        return _STORED[dtype_of(layer) if layer else "float32"]

    def ours(name: str) -> np.ndarray:
        tensor = parameters[name]  # NumPy does not have bfloat16
        return (widen(tensor) if tensor.dtype == DTYPES["bfloat16"] else tensor).numpy()

    places = {name: (stored_as(entry.ours[0]), entry.shape) for name, entry in entries.items()}
    # One inside the other, so that a failure in either leaves both old files as they were.
    with atomic_file(folder / "config.json") as file:
        file.write(json.dumps(config_json.to_json(model.config, dtype), indent=2).encode() + b"\n")
        safetensors_file.write(
            folder / hub.WEIGHTS,
            places,
            lambda name: _theirs(entries[name], parameters, ours),
            {"format": "pt"},
        )


def save_gguf(
    model: GPT, path: str | Path, tokenizer: Encoding | None = None, dtype: str | None = None
) -> None:
    """Write a GGUF file, whole or not at all, with which llama.cpp continues as the model does.

    Args:
        tokenizer: whose tokens and merges go along; None: ids in, ids out.
        dtype: of the matrices, one of GGUF_TYPES; by default as the model holds them, bfloat16 as
            float32. The rest stays float32, as in llama.cpp's own `convert_hf_to_gguf.py`, and so
            does in Q8_0 what does not divide into blocks.
    Raises:
        InputError: for a model that llama.cpp's GPT-2 is not, a tokenizer that its vocabulary
            cannot hold, or a file that cannot be written.
    """
    config, held = model.config, dtype_of(model.wte)
    check_gguf(config, dtype)
    dtype = dtype or (held if held in GGUF_TYPES else "float32")
    parameters, layers = get_state_dict(model), matrices(model)

    def ours(name: str) -> np.ndarray:
        layer = layers.get(name.removesuffix(".weight"))
        return widened(layer) if layer else parameters[name].numpy()

    metadata = {
        "general.architecture": "gpt2",
        "gpt2.context_length": config.block_size,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.inner_dim,
        "gpt2.block_count": config.n_layer,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "gpt2.vocab_size": config.vocab_size,
        **gguf_metadata(tokenizer, config.vocab_size),
    }
    entries = layout(config, GGUF)

    def stored_as(entry: Entry) -> str:
        kind = GGUF_TYPES[dtype]
        full = len(entry.shape) == 1 or entry.ours == ("wpe.weight",)
        return "F32" if full or (kind == "Q8_0" and entry.shape[1] % 32) else kind

    places = {name: (stored_as(entry), entry.shape) for name, entry in entries.items()}
    gguf_file.write(path, metadata, places, lambda name: _theirs(entries[name], parameters, ours))


def check_gguf(config: GPTConfig, dtype: str | None) -> None:
    """Refuse, by the name of what it cannot say, a model or type that GGUF's gpt2 is not."""
    if dtype not in (None, *GGUF_TYPES):
        raise unknown("dtype of GGUF", dtype, GGUF_TYPES)
    for name in _GGUF_FIXED:
        if (value := getattr(config, name)) != getattr(GPTConfig, name):
            raise InputError(f"{name} is {value!r}, which GGUF's gpt2 cannot say: use another form")


def _theirs(entry: Entry, known: Container[str], ours: Callable[[str], np.ndarray]) -> np.ndarray:
    """One of their tensors, put together from ours."""
    if entry.ours[0] not in known:  # their forms always have biases: without, they are zero
        return np.zeros(entry.shape, np.float32)
    array = np.concatenate([ours(name) for name in entry.ours])
    return array.T if entry.transposed else array
