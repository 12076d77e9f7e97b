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
from tinygpt.tokenizer.encoding import end_token
from tinygpt.tokenizer.tokenizer import END, Tokenizer

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
        found = self._graphs[key](*map(self.model.placement.batch, (inputs, targets)))
        return buffers.read(found).reshape(found.shape)

    def _score(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs).contiguous()
        targets = buffers.moved(targets, logits.device)
        losses = _log_sum_exp(logits) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        hits = logits.argmax(-1) == targets
        return Tensor.stack(losses, hits.float()).realize()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model.losses(inputs, targets).realize()


def _log_sum_exp(x: Tensor) -> Tensor:
    """float32 (..., V) -> (...), with a sum in two stages.

    In one, each of thousands of terms is rounded to the whole sum, which cost 2e-5 nats a token.
    """
    top = x.max(-1, keepdim=True)
    parts = (x - top).exp().pad((0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128)).sum(-1)
    return parts.contiguous().sum(-1).log() + top.squeeze(-1)


class Begun:
    """Tokens behind one more, the begin token, which also stands for the end tokens in them."""

    def __init__(self, tokens: TokenFile | np.ndarray, begin: int, end: int | None) -> None:
        self._tokens, self._begin, self._end = tokens, begin, end

    def __len__(self) -> int:
        return 1 + len(self._tokens)

    def __getitem__(self, places: slice) -> np.ndarray:
        """The ids from one place to another, int32."""
        start, stop, _ = places.indices(len(self))
        found = self._tokens[max(0, start - 1) : max(0, stop - 1)].astype(np.int32)
        found[found == self._end] = self._begin
        return found if start else np.concatenate([[self._begin], found])[:stop]


class Window(NamedTuple):
    """A place in a text: where the window starts, and which of its targets count."""

    start: int
    before: int  # how many targets at its start do not count
    counted: int  # how many after them do


def windows(start: int, stop: int, block_size: int, stride: int) -> list[Window]:
    """Windows in which each of a document's tokens but the first is a target that counts, once.

    Args:
        start, stop: where the document lies, at least two tokens. Where it has more than a window
            holds, all windows are whole, so the last may overlap the one before by more.
        stride: how far the next window is: tokens that it sees before those that count are
            block_size - stride.
    """
    last = stop - 1  # which is a target only
    found = [Window(start, 0, min(block_size, last - start))]
    while (done := found[-1].start + block_size) < last:
        begin = min(found[-1].start + stride, last - block_size)
        found.append(Window(begin, done - begin, begin + block_size - done))
    return found


def places_of(end: int | None, tokens: TokenFile | np.ndarray) -> list[int]:
    """Where an id stands in a text; None stands nowhere."""
    found, part = [], 1 << 20
    for first in range(0, len(tokens) if end is not None else 0, part):
        found += (first + np.flatnonzero(tokens[first : first + part] == end)).tolist()
    return found


def spread(length: int, block_size: int, most: int) -> list[Window]:
    """At most so many windows beside each other, spread evenly over a text."""
    places = (length - 1) // block_size
    chosen = np.linspace(0, places - 1, min(places, most)).astype(int)
    return [Window(int(place) * block_size, 0, block_size) for place in chosen]


def mean_loss(
    losses: Losses,
    tokens: TokenFile | np.ndarray | Begun,
    places: Sequence[Window],
    block_size: int,
    batch_size: int,
) -> float:
    """The mean of the losses that count, in nats a token: see `sum_of_losses`."""
    total, count = sum_of_losses(losses, tokens, places, block_size, batch_size)
    return total / count


def sum_of_losses(
    losses: Losses,
    tokens: TokenFile | np.ndarray | Begun,
    places: Sequence[Window],
    block_size: int,
    batch_size: int,
) -> tuple[float, int]:
    """The sum of the losses that count, in nats, and how many these are.

    Args:
        losses: of inputs and targets (batch_size, block_size).
        tokens: (N,) ids.
        places: from `windows` or `spread`.
    """
    total, length = 0.0, block_size + 1
    for first in range(0, len(places), batch_size):
        group = places[first : first + batch_size]
        rows = [*group, *[group[-1]] * (batch_size - len(group))]  # one shape for all
        text = np.zeros((batch_size, length), np.int32)  # what follows a short text changes nothing
        for ids, row in zip(text, rows, strict=True):
            found = tokens[row.start : row.start + length]
            ids[: len(found)] = found
        found = losses(text[:, :-1].copy(), text[:, 1:].copy())
        for row, window in zip(found, group, strict=False):
            last = window.before + window.counted
            total += row[window.before : last].sum(dtype=np.float64)
    return total, sum(window.counted for window in places)


def evaluate_data(
    model: GPT,
    data: Dataset,
    split: str = "val",
    stride: int | None = None,
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """Loss and what follows from it on a split of prepared tokens, each document on its own.

    A document is what stands between two end tokens. Before each of them the model sees its begin
    token, which is no target: so the order of documents changes nothing, and bits per character
    compare over tokenizers. Where the tokenizer has no begin token, as one of characters, the first
    token is no target either.

    Args:
        tokenizer: the model's own, where it has one; tokens of another are refused.
        stride: see `windows`; None is half of the window.
        source: what an error calls the text; None is the data's folder and the split.
    Returns:
        loss (nats a token), perplexity, bits_per_byte and bits_per_character of the split's text,
        tokens (how many were predicted), documents.
    Raises:
        InputError: when the stride or the data does not fit the model.
    """
    tokens, block_size = getattr(data, split), model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise InputError(f"stride is {stride}: it must be from 1 to the window, {block_size}")
    data.check(model.config.vocab_size, tokenizer)
    end, begin = end_token(data.tokenizer()), (tokenizer or data.tokenizer()).start
    text = tokens if begin is None else Begun(tokens, begin, end)
    ends = places_of(end, tokens)
    cuts = [place + len(text) - len(tokens) for place in ends]
    bounds = zip([0, *cuts], [*cuts, len(text)], strict=True)
    documents = [(start, stop) for start, stop in bounds if stop - start > 1]
    if not documents:
        least = (
            f"no token but {END}" if ends else f"{len(tokens)} tokens, and at least 2 are needed"
        )
        raise InputError(f"{source or f'{data.folder}: {split}'} has {least}: give more text")
    block_size = min(block_size, max(stop - start for start, stop in documents) - 1)
    places = [place for bounds in documents for place in windows(*bounds, block_size, stride)]
    batch_size = min(batch_size, len(places))
    loss = mean_loss(Scorer(model).losses, text, places, block_size, batch_size)
    if not math.isfinite(loss):
        raise InputError(NOT_NUMBERS)
    counts = data.header.splits[split]
    bits = loss / math.log(2) * (counts.tokens - len(ends))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits / max(1, counts.bytes),
        "bits_per_character": bits / max(1, counts.characters),
        "tokens": sum(place.counted for place in places),
        "documents": len(documents),
    }
