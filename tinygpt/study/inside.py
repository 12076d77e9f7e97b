"""One forward pass of one text, the model's own, and what it computed on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.checkpoints.quantization import convert, dtype_of
from tinygpt.errors import CheckpointError, InputError, say
from tinygpt.layers import Record
from tinygpt.model import GPT, NOT_NUMBERS
from tinygpt.runtime.buffers import tensor


@dataclass(frozen=True)
class Inside:
    """What a forward pass of T tokens computes in a model of L blocks and H heads.

    The residual is what runs through the blocks, to which each sublayer adds. It is kept at 1 + 2 L
    places: behind the embeddings, and in each block behind its attention and its feed-forward.
    """

    ids: list[int]  # the T tokens
    places: tuple[str, ...]  # where the residuals stand, in words
    residuals: np.ndarray  # float32 (1 + 2 L, T, C)
    attention: np.ndarray  # float32 (L, H, T, T): how much of each token every token reads
    logits: np.ndarray  # float32 (T, V): what the model itself gives


def look(model: GPT, ids: Sequence[int]) -> Inside:
    """What a model computes of a text, once.

    Args:
        ids: of the text, at least one; of more than the window holds, the last are taken.
    Raises:
        InputError: when there are none, one is none of the vocabulary, or what is computed is no
            number.
    """
    ids, record = in_window(model, ids), Record()
    logits = model([ids], record=record)
    states = [record.hidden_states[0]]
    for half, whole in zip(record.half_states, record.hidden_states[1:], strict=True):
        states += [half, whole]
    Tensor.realize(logits, *states, *record.attention_weights)
    found = Inside(
        ids,
        places(model),
        np.stack([state[0].numpy() for state in states]),
        np.stack([weights[0].numpy() for weights in record.attention_weights]),
        logits[0].numpy(),
    )
    check_numbers(model, found.logits)
    return found


def check_numbers(model: GPT, logits: np.ndarray) -> None:
    """Refuse logits that are infinite or not a number, and name the weight of which they come."""
    if np.isfinite(logits).all():
        return
    for name, weight in get_state_dict(model).items():
        if not np.isfinite(weight.numpy()).all():
            raise CheckpointError(f"{name} has values that are infinite or not a number")
    raise InputError(NOT_NUMBERS)


def as_float32(model: GPT) -> GPT:
    """The model itself, its weights widened to float32, which is said where they were not."""
    if (held := dtype_of(model.wte)) != "float32":
        say(f"its weights are {held}: looked at as float32")
        convert(model, "float32")
    return model


def in_window(model: GPT, ids: Sequence[int]) -> list[int]:
    """The tokens of a text that the model can look at: all, or the last.

    Raises:
        InputError: when there are none.
    """
    if not ids:
        raise InputError("the text is empty: give some")
    window = model.config.block_size
    if len(ids) > window:
        say(f"the text has {len(ids)} tokens, the model's window {window}: the last are looked at")
    return list(ids[-window:])


def places(model: GPT) -> tuple[str, ...]:
    """Where the residuals of an `Inside` stand."""
    blocks = range(model.config.n_layer)
    return "embedding", *(f"block {i} {part}" for i in blocks for part in ("attn", "mlp"))


def unembedded(model: GPT, residual: np.ndarray) -> np.ndarray:
    """The logits that the model would give if this residual were its last: (..., C) -> (..., V).

    The last layer norm stands before the output projection in a pre-norm model; in a post-norm one
    the residual is normalised already.
    """
    x = tensor(residual)
    return model.logits(model.ln_f(x) if model.config.norm == "pre" else x).numpy()


def at(logs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Of each row of log probabilities that of one token: (T, V), int (T,) -> (T,)."""
    return np.take_along_axis(logs, ids[:, None], -1)[:, 0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
