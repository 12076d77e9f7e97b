"""In how many bits the weights are held: float32, float16, bfloat16, or int8 with a scale per row.

Only the matrices that are multiplied with are narrowed; norms, biases and positional encodings,
which are a thousandth of the bytes, stay float32, as do the activations: a weight is widened where
it is used.
"""

from __future__ import annotations

import numpy as np

from tinygpt.checkpoints.stored_tensor import to_bfloat16
from tinygpt.errors import InputError, unknown
from tinygpt.layers import Embedding, Linear
from tinygpt.model import DTYPES, GPT
from tinygpt.ops import widen
from tinygpt.runtime import device
from tinygpt.runtime.buffers import laid_like


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that does not exist, or that the backend cannot hold."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not supported(dtype):
        raise InputError(
            f"{device.default()} does not work with {dtype}: choose float32, or another DEV"
        )


def supported(dtype: str) -> bool:
    """Whether tinygrad's backend can hold this dtype, one of DTYPES, and compute with it."""
    return device.holds(DTYPES[dtype])


def matrices(model: GPT) -> dict[str, Linear | Embedding]:
    """The layers whose weights are multiplied with, by their names in the model."""
    found: dict[str, Linear | Embedding] = {"wte": model.wte}
    if not model.config.tie_word_embeddings:
        found["lm_head"] = model.lm_head
    for i, block in enumerate(model.blocks):
        found |= {f"blocks.{i}.{name}": layer for name, layer in block.linears()}
    return found


def dtype_of(layer: Linear | Embedding) -> str:
    """How a layer's weight is held: one of DTYPES."""
    return next(name for name, dtype in DTYPES.items() if layer.weight.dtype == dtype)


def convert(model: GPT, dtype: str) -> GPT:
    """Hold the model's matrices in this dtype from now on; the model itself, changed.

    Args:
        dtype: one of DTYPES.
    Raises:
        InputError: for an unknown dtype, or a weight too large for it.
    """
    check_dtype(dtype)
    for name, layer in matrices(model).items():
        if dtype_of(layer) != dtype:
            set_weight(layer, widened(layer), dtype, name)
    return model


def widened(layer: Linear | Embedding) -> np.ndarray:
    """A layer's weight as float32 (out_features, in_features), whatever it is held in."""
    weight = widen(layer.weight).numpy()
    return weight if layer.scale is None else weight * layer.scale.numpy()[:, None]


def set_weight(
    layer: Linear | Embedding,
    weight: np.ndarray,
    dtype: str,
    name: str,
    scale: np.ndarray | None = None,
) -> None:
    """Give a layer a weight, to be held in this dtype.

    Args:
        weight: (out_features, in_features), a float, or int8 with its scale (out_features,).
        dtype: one of DTYPES.
        name: of the weight, for the error.
    Raises:
        InputError: for values that the dtype cannot hold.
    """
    if scale is not None:
        largest = np.maximum(weight.max(1), -weight.min(1).astype(np.float32))
        with np.errstate(over="ignore"):
            _need_finite(name, largest * scale, dtype)
        if dtype != "int8":
            weight, scale = weight * scale[:, None], None
    if dtype == "int8" and scale is None:
        _need_finite(name, np.abs(weight).max(1).astype(np.float32), dtype)
        weight, scale = round_to_int8(weight)
    elif dtype != "int8":
        weight = _round_to_float(name, weight, dtype)
    place = layer.weight
    layer.weight = laid_like(weight, place)
    layer.scale = None if scale is None else laid_like(scale, place)


def round_to_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """round(weight / scale), with scale = max |row| / 127: a row's largest number is exact.

    Args:
        weight: float (out_features, in_features), finite.
    Returns:
        int8 of the same shape, and the scales, float32 (out_features,).
    Source: Dettmers et al. 2022, "LLM.int8()", equation 1, by rows.
    """
    largest = np.abs(weight).max(1).astype(np.float32)
    scale = np.maximum(largest / 127, np.finfo(np.float32).tiny)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def _round_to_float(name: str, weight: np.ndarray, dtype: str) -> np.ndarray:
    """The weight in float32, float16, or bfloat16 as uint16, to nearest; refused if too large."""
    if dtype == "bfloat16":
        halves = to_bfloat16(weight)
        if (halves & 0x7F80 == 0x7F80).any():  # the exponent of what is infinite or no number
            _need_finite(name, np.array(np.inf), dtype)
        return halves
    if dtype == "float32" or weight.dtype == np.float16:
        return weight.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        halves = weight.astype(np.float16)
    _need_finite(name, halves, dtype)
    return halves


def _need_finite(name: str, values: np.ndarray, dtype: str) -> None:
    if not np.isfinite(values).all():
        wider = {"float32": "", "bfloat16": ": choose float32"}
        advice = wider.get(dtype, ": choose float32 or bfloat16")
        raise InputError(f"{name} has values too large for {dtype}{advice}")
