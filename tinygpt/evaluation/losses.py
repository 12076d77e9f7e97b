"""How well a model predicts the next token: its loss on prepared tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.data.dataset import Dataset
from tinygpt.data.token_file import TokenFile
from tinygpt.errors import InputError
from tinygpt.model import GPT, NOT_NUMBERS
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import CapturedStep, capture
from tinygpt.tokenizer.tokenizer import Tokenizer

# int32 (B, T) inputs and targets -> float32 (B, T), the targets' losses in nats.
Losses = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Scorer:
    """A model's losses, and where its likeliest token was the right one; one graph a shape."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._graphs: dict[tuple, CapturedStep] = {}

    def __call__(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 (B, T) twice -> losses, float32 (B, T), and hits, bool (B, T)."""
        losses, hits = self._run(self._score, inputs, targets)
        return losses, hits > 0

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The losses alone, which is faster."""
        return self._run(self._losses, inputs, targets)

    def _run(
        self, function: Callable[[Tensor, Tensor], Tensor], inputs: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        key = function.__name__, inputs.shape
        if key not in self._graphs:
            what = function.__name__, self.model, type(self)
            self._graphs[key] = capture(function, get_state_dict(self.model), what)
        found = self._graphs[key](buffers.tensor(inputs), buffers.tensor(targets))
        return buffers.read(found).reshape(found.shape)

    def _score(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs).contiguous()
        losses = logits.sparse_categorical_crossentropy(targets, reduction="none")
        hits = logits.argmax(-1) == targets
        return Tensor.stack(losses, hits.float()).realize()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.losses(inputs, targets).realize()


class Window(NamedTuple):
    """A place in a text: where the window starts, and how many targets at its end count."""

    start: int
    counted: int


def windows(length: int, block_size: int, stride: int) -> list[Window]:
    """Windows in which each of a text's tokens but the first is a target that counts, once.

    Args:
        length: of the text in tokens, at least block_size + 1.
        block_size: of each window; all are whole, so the last may overlap the one before.
        stride: how far the next window is: tokens that it sees before those that count are
            block_size - stride.
    """
    found = [Window(0, block_size)]
    while (done := found[-1].start + block_size) < length - 1:
        start = min(found[-1].start + stride, length - 1 - block_size)
        found.append(Window(start, start + block_size - done))
    return found


def spread(length: int, block_size: int, most: int) -> list[Window]:
    """At most so many windows beside each other, spread evenly over a text."""
    places = (length - 1) // block_size
    chosen = np.linspace(0, places - 1, min(places, most)).astype(int)
    return [Window(int(place) * block_size, block_size) for place in chosen]


def mean_loss(
    losses: Losses,
    tokens: TokenFile | np.ndarray,
    places: Sequence[Window],
    block_size: int,
    batch_size: int,
) -> float:
    """The mean of the losses that count, in nats a token.

    Args:
        losses: of inputs and targets (batch_size, block_size).
        tokens: (N,) ids.
        places: from `windows` or `spread`.
    """
    total, length = 0.0, block_size + 1
    for first in range(0, len(places), batch_size):
        group = places[first : first + batch_size]
        rows = [*group, *[group[-1]] * (batch_size - len(group))]  # one shape for all
        text = np.stack([tokens[row.start : row.start + length] for row in rows]).astype(np.int32)
        found = losses(text[:, :-1].copy(), text[:, 1:].copy())
        for row, window in zip(found, group, strict=False):
            total += row[block_size - window.counted :].sum(dtype=np.float64)
    return total / sum(window.counted for window in places)


def evaluate_data(
    model: GPT,
    data: Dataset,
    split: str = "val",
    stride: int | None = None,
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Loss and what follows from it on a split of prepared tokens.

    Args:
        tokenizer: the model's own, where it has one; tokens of another are refused.
        stride: see `windows`; None is the whole window, the fastest.
    Returns:
        loss (nats a token), perplexity, bits_per_byte and bits_per_character of the split's text,
        tokens (how many were predicted).
    Raises:
        InputError: when the stride or the data does not fit the model.
    """
    tokens, block_size = getattr(data, split), model.config.block_size
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise InputError(f"stride is {stride}: it must be from 1 to the window, {block_size}")
    if len(tokens) < 2:
        raise InputError(f"{data.folder}: {split} has {len(tokens)} tokens: at least 2 are needed")
    data.check(model.config.vocab_size, tokenizer)
    block_size = min(block_size, len(tokens) - 1)
    places = windows(len(tokens), block_size, stride)
    batch_size = min(batch_size, len(places))
    loss = mean_loss(Scorer(model).losses, tokens, places, block_size, batch_size)
    if not math.isfinite(loss):
        raise InputError(NOT_NUMBERS)
    text = data.header.splits[split]
    bits = loss / math.log(2) * text.tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits / max(1, text.bytes),
        "bits_per_character": bits / max(1, text.characters),
        "tokens": len(tokens) - 1,
    }
