"""Checkpoints in Hugging Face form <-> our model, every key and shape compared both ways.

A folder holds `config.json` and `model.safetensors`, or shards of it with an index. GPT-2's files
keep query, key and value in one matrix, `c_attn`, and store each linear layer's weight as
(in, out); ours are separate and (out, in).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device
from tinygrad.nn.state import get_state_dict

from tinygpt import backend, hub, safetensors
from tinygpt.config import GPTConfig, InputError, show, unknown
from tinygpt.files import CheckpointError, atomic_file, read_json, reason
from tinygpt.kernels import widen
from tinygpt.model import GPT
from tinygpt.precision import DTYPES, check_dtype, dtype_of, matrices, set_weight, supported
from tinygpt.safetensors import TensorInfo

# Their names for what is called otherwise here, older spellings first.
_FIELDS = {
    "n_ctx": "block_size",
    "n_positions": "block_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "activation_function": "activation",
}
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}
# Fields that change the forward pass in ways the model has no part for.
_UNSUPPORTED = ("add_cross_attention", "is_encoder_decoder", "quantization_config", "pruned_heads")
# Causal masks, which older files carry along.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# What a tensor may be stored in, and what the model then holds a matrix in.
_FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LOADERS = 2  # tensors that are read and turned at a time
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


def load_pretrained(name_or_path: str | Path, dtype: str | None = None) -> GPT:
    """Load a GPT-2 checkpoint in Hugging Face form.

    Args:
        name_or_path: a folder, or a name on the Hugging Face Hub: see `hub.resolve`.
        dtype: what to hold matrices in, one of `precision.DTYPES`; None takes what each is stored
            in, or float32 where the backend cannot.
    Raises:
        InputError: when it cannot be found, fetched or held in memory.
        CheckpointError: when it is damaged, incomplete, or not a GPT-2.
    """
    if dtype is not None:
        check_dtype(dtype)
    folder = hub.resolve(name_or_path)
    config = read_config(folder)
    stored = _read_headers(folder)
    if config.n_layer > len(stored):  # before names are listed for each of a billion layers
        fact = f"{len(stored)} tensors, but config.json says n_layer {show(config.n_layer)}"
        raise CheckpointError(f"{folder} has {fact}")
    layout = _layout(config, any(info.dtype == "I8" for _, info in stored.values()))
    _compare(folder, layout, {name: info for name, (_, info) in stored.items()}, config)
    largest = max(math.prod(shape) for shape, _ in layout.values())
    held = {name: dtype or _as_stored(info.dtype) for name, (_, info) in stored.items()}
    size_bytes = sum(
        math.prod(shape) * DTYPES[held[name]].itemsize for name, (shape, _) in layout.items()
    )
    backend.require_memory(size_bytes + _LOADERS * 4 * largest, f"the model in {folder}")
    model = GPT(config, seed=None)
    parameters, layers = get_state_dict(model), matrices(model)

    def read(name: str) -> list[np.ndarray]:
        array = safetensors.read_tensor(*stored[name])
        return np.split(array.T if _is_transposed(name) else array, len(layout[name][1]))

    def load(name: str) -> None:
        parts, ours, scale = read(name), layout[name][1], name.removesuffix("weight") + "scale"
        if not config.bias and name.endswith(".bias"):
            if any(part.any() for part in parts):
                raise CheckpointError(f"{folder}: {name} is not zero, but config.json says no bias")
            return
        scales = read(scale) if scale in layout else [None] * len(ours)
        for our_name, part, scale in zip(ours, parts, scales, strict=True):
            if layer := layers.get(our_name.removesuffix(".weight")):
                set_weight(layer, part, held[name], name, scale)
            else:
                backend.write(parameters[our_name], part.astype(np.float32, copy=False))

    names = [name for name in layout if not name.endswith(".scale")]  # read with their weights
    _side_by_side(load, names)
    return model


def _side_by_side(load: Callable[[str], None], names: Sequence[str]) -> None:
    """Load all names, some at a time where that is safe: a GPU driver may know one thread only."""
    if Device.DEFAULT != "CPU":
        for name in names:
            load(name)
        return
    with ThreadPoolExecutor(_LOADERS) as pool:
        try:
            for future in [pool.submit(load, name) for name in names]:
                future.result()
        finally:  # after an error, read no further
            pool.shutdown(cancel_futures=True)


def _as_stored(dtype: str) -> str:
    held = "int8" if dtype == "I8" else _FLOATS[dtype]
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
    parameters, layers = get_state_dict(model), matrices(model)
    dtype = dtype_of(model.wte)
    layout = _layout(model.config, dtype == "int8")

    def value(name: str) -> np.ndarray:
        shape, ours = layout[name.removeprefix("transformer.")]
        if ours[0] not in parameters:  # their form always has biases: without, they are zero
            return np.zeros(shape, np.float32)
        tensors = [parameters[our_name] for our_name in ours]
        if tensors[0].dtype == DTYPES["bfloat16"]:  # which NumPy does not have
            tensors = [widen(tensor) for tensor in tensors]
        array = np.concatenate([tensor.numpy() for tensor in tensors])
        return array.T if _is_transposed(name) else array

    def stored_as(ours: str) -> str:
        layer = layers.get(ours.removesuffix(".weight"))
        return _STORED[dtype_of(layer) if layer else "float32"]

    entries = {
        name if name.startswith("lm_head") else f"transformer.{name}": (stored_as(ours[0]), shape)
        for name, (shape, ours) in layout.items()
    }
    # One inside the other, so that a failure in either leaves both old files as they were.
    with atomic_file(folder / "config.json") as file:
        file.write(json.dumps(_to_their_config(model.config, dtype), indent=2).encode() + b"\n")
        safetensors.write(folder / hub.WEIGHTS, entries, value, {"format": "pt"})


def read_config(folder: Path) -> GPTConfig:
    """The configuration that a folder's `config.json` describes.

    Raises:
        CheckpointError: when it is missing or unreadable, holds values that cannot work, or names
            a part that the model does not have.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    try:
        if theirs.get("model_type", "gpt2") not in ("gpt2", "tinygpt"):
            raise InputError(f"model_type is {theirs['model_type']!r}: only gpt2 can be loaded")
        for name in _UNSUPPORTED:
            if theirs.get(name):
                raise InputError(f"{name} is set, which this model has no part for")
        known = {field.name for field in fields(GPTConfig)}
        ours = {name: value for name, value in theirs.items() if name in known}
        ours |= {ours: theirs[name] for name, ours in _FIELDS.items() if name in theirs}
        if "activation_function" in theirs:
            name = theirs["activation_function"]
            if not isinstance(name, str) or name not in _ACTIVATIONS:
                raise unknown("activation_function", name, _ACTIVATIONS)
            ours["activation"] = _ACTIVATIONS[name]
        return GPTConfig(**ours)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _to_their_config(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """GPTConfig -> what `config.json` holds."""
    ours = {field.name: getattr(config, field.name) for field in fields(config)}
    names = {v: k for k, v in reversed(_ACTIVATIONS.items())}  # the first spelling of each
    extra = {name: ours.pop(name) for name in ("norm", "position", "shortcut", "bias")}
    changed = {k: v for k, v in extra.items() if v != getattr(GPTConfig, k)}
    is_gpt2 = changed.keys() <= {"bias"} and dtype != "int8"
    end = 50256 if config.vocab_size > 50256 else None
    return {
        "model_type": "gpt2" if is_gpt2 else "tinygpt",
        "architectures": ["GPT2LMHeadModel"] if is_gpt2 else ["GPT"],
        "n_positions": ours.pop("block_size"),
        "activation_function": names[ours.pop("activation")],
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
        **ours,
        **changed,
    }


def _layout(config: GPTConfig, int8: bool) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Each of their tensors: name -> (shape in the file, the names of ours it holds in order).

    In int8, which is our own addition, each matrix has a scale for each output beside it.
    """
    C, inner = config.n_embd, config.inner_dim
    layout: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}

    def add(theirs: str, shape: tuple[int, ...], *ours: str) -> None:
        layout[f"{theirs}.weight"] = shape, tuple(f"{name}.weight" for name in ours)
        if int8 and len(shape) == 2 and theirs != "wpe":
            rows = shape[1 if _is_transposed(f"{theirs}.weight") else 0]
            layout[f"{theirs}.scale"] = (rows,), tuple(f"{name}.scale" for name in ours)
        if not theirs.startswith(("wte", "wpe", "lm_head")):
            layout[f"{theirs}.bias"] = shape[-1:], tuple(f"{name}.bias" for name in ours)

    add("wte", (config.vocab_size, C), "wte")
    if config.position == "learned":
        add("wpe", (config.block_size, C), "wpe")
    for i in range(config.n_layer):
        us, them = f"blocks.{i}", f"h.{i}"
        add(f"{them}.ln_1", (C,), f"{us}.ln_1")
        add(f"{them}.attn.c_attn", (C, 3 * C), *(f"{us}.attn.{part}_proj" for part in "qkv"))
        add(f"{them}.attn.c_proj", (C, C), f"{us}.attn.out_proj")
        add(f"{them}.ln_2", (C,), f"{us}.ln_2")
        add(f"{them}.mlp.c_fc", (C, inner), f"{us}.mlp.c_fc")
        add(f"{them}.mlp.c_proj", (inner, C), f"{us}.mlp.c_proj")
    if config.norm == "pre":
        add("ln_f", (C,), "ln_f")
    if not config.tie_word_embeddings:
        add("lm_head", (config.vocab_size, C), "lm_head")
    return layout


def _is_transposed(name: str) -> bool:
    """Whether their tensor is a Conv1D weight, stored as (in, out)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _read_headers(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a folder that is not a mask: name without prefix -> (file, where in it)."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in _weight_files(folder):
        tensors, _ = safetensors.read_header(path)
        for name, info in tensors.items():
            name = name.removeprefix("transformer.")
            if _MASKS.fullmatch(name):
                continue
            if name in found:
                raise CheckpointError(f"{path}: {name!r} is also in {found[name][0].name}")
            found[name] = path, info
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / hub.WEIGHTS).is_file():
        return [folder / hub.WEIGHTS]
    if not (folder / hub.INDEX).is_file():
        raise CheckpointError(f"{folder}: neither {hub.WEIGHTS} nor {hub.INDEX} is there")
    return [folder / name for name in hub.shards(folder / hub.INDEX)]


def _compare(folder: Path, layout: dict, stored: dict[str, TensorInfo], config: GPTConfig) -> None:
    """Refuse a folder whose tensors are not the ones that its config asks for."""
    copies = {"lm_head.weight"} if config.tie_word_embeddings else set()
    surplus = [show(name)[1:-1] for name in sorted(set(stored) - set(layout) - copies)]
    faults = []
    if missing := [name for name in layout if name not in stored]:
        faults.append(f"missing {_some(missing)}")
    if surplus:
        faults.append(f"not part of the model: {_some(surplus)}")
    for name, (shape, _) in layout.items():
        if name in stored and stored[name].shape != shape:
            found = show(stored[name].shape)
            faults.append(f"{name} is {found}, config.json asks for {show(shape)}")
        allowed = [*_FLOATS] if name.removesuffix("weight") + "scale" not in layout else ["I8"]
        if name in stored and stored[name].dtype not in allowed:
            faults.append(f"{name} is {stored[name].dtype}, allowed are {', '.join(allowed)}")
    if faults:
        raise CheckpointError(f"{folder}: {_some(faults, '; ')}")


def _some(names: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
