"""What every operation of a forward pass does: formula, shapes, parameters, work, and numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor

import tinygpt
from tinygpt import ops
from tinygpt.errors import InputError
from tinygpt.layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    TransformerBlock,
)
from tinygpt.model import GPT
from tinygpt.study.inside import check_numbers, in_window


@dataclass(frozen=True)
class Operation:
    """One operation on T tokens, or all of a block's together."""

    name: str
    formula: str
    given: tuple[int, ...]  # the shape of what goes in
    gives: tuple[int, ...]  # of what comes out
    parameters: int
    flops: int  # multiplications and additions
    rms: float  # of what comes out: the root of the mean square
    lowest: float
    highest: float
    similarity: float  # mean cosine between the vectors of two different tokens; NaN for one token
    source: str  # file and line of the code that does it


@dataclass(frozen=True)
class Explanation:
    """A forward pass, operation by operation."""

    ids: list[int]
    operations: list[Operation]  # a block is one, but for the one that is open
    parameters: int  # of all operations; a tied table counts once
    flops: int


@dataclass(frozen=True)
class _Call:
    """One call of a part of the model, while it computed a text."""

    name: str  # the part's, as a weight's name begins: blocks.0.attn.q_proj
    part: Any
    x: Tensor  # (1, T, ...)
    y: Tensor
    added: bool  # whether a residual was added


class _Watched:
    """A part of the model that keeps what it is given and gives."""

    def __init__(self, part: Any, name: str, seen: list[_Call]) -> None:
        self._part, self._name, self._seen = part, name, seen

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        more = () if residual is None else (residual,)
        y = self._part(x, *more).contiguous()
        self._seen.append(_Call(self._name, self._part, x, y, residual is not None))
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _watching(part: Any, name: str, seen: list[_Call]) -> Any:
    """A part of the model, or all of it, that keeps the calls of all within it."""
    if isinstance(part, Linear | LayerNorm | Embedding):
        return _Watched(part, name, seen)
    if isinstance(part, list):
        return [_watching(each, f"{name}.{i}", seen) for i, each in enumerate(part)]
    if not isinstance(part, GPT | TransformerBlock | MultiHeadAttention | FeedForward):
        return part
    twin = copy(part)
    for own, value in vars(part).items():
        setattr(twin, own, _watching(value, f"{name}.{own}" if name else own, seen))
    return twin


def explain(model: GPT, ids: Sequence[int], block: int | None = None) -> Explanation:
    """Run a text through the model, and say what each operation did.

    Args:
        block: the one to open; None leaves all closed.
    Raises:
        InputError: for an empty text, a block that there is not, or logits that are no numbers.
    """
    layers = model.config.n_layer
    if block is not None and not 0 <= block < layers:
        raise InputError(f"block is {block}: it must be from 0 to {layers - 1}")
    ids, calls = in_window(model, ids), list[_Call]()
    hidden = _watching(model, "", calls).hidden_states([ids])
    logits = model.logits(hidden)
    Tensor.realize(logits, *(each for call in calls for each in (call.x, call.y)))
    check_numbers(model, logits.numpy())
    found = _Explained(model, len(ids)).all(calls, logits)
    totals = sum(each.parameters for each in found), sum(each.flops for each in found)
    return Explanation(ids, _closed(found, block), *totals)


class _Explained:
    """Makes operations of calls."""

    def __init__(self, model: GPT, length: int) -> None:
        self.model, self.config, self.length = model, model.config, length

    def all(self, calls: list[_Call], logits: Tensor) -> list[Operation]:
        """The operations in their order; what is no part of the model stands between its parts."""
        found, embedded = list[Operation](), False
        for call in calls:
            if call.name.startswith("blocks.") and not embedded:
                found.append(self._embedded(call.x))
                embedded = True
            own = call.name.rpartition(".")[2]
            if own == "out_proj":
                found.append(self._attention(call))
            if own == "c_proj":
                found.append(self._activation(call))
            found.append(self._part(call))
        found.append(self._unembedding(logits))
        return found

    def _part(self, call: _Call) -> Operation:
        part, count = call.part, call.y.numel()
        weights = [part.weight, *([part.bias] if getattr(part, "bias", None) is not None else [])]
        parameters = sum(int(weight.numel()) for weight in weights)
        bias = " + b" * (len(weights) == 2)
        if isinstance(part, Embedding):
            row = "the row of each " + ("id" if call.name == "wte" else "position")
            return self._row(call.name, row, call.x, call.y, parameters, 0, Embedding)
        if isinstance(part, LayerNorm):
            flops = count * (_NORM_FLOPS + len(weights) - 1)
            formula = f"(x - mean) / sqrt(var + {part.epsilon:g}) * w{bias}"
            return self._row(call.name, formula, call.x, call.y, parameters, flops, LayerNorm)
        formula = f"x W.T{bias}" + " + residual" * call.added
        flops = count * (2 * part.weight.shape[1] + len(weights) - 1 + call.added)
        return self._row(call.name, formula, call.x, call.y, parameters, flops, Linear)

    def _embedded(self, x: Tensor) -> Operation:
        """The sum of both embeddings; waves are no part of the model, and have no weights."""
        learned = self.config.position == "learned"
        how = "token + position" if learned else "token + waves"
        flops = x.numel() * (1 if learned else 1 + _WAVE_FLOPS)
        return self._row("embedding", how, x, x, 0, flops, GPT.hidden_states)

    def _attention(self, call: _Call) -> Operation:
        """What stands between the query, key and value and the output projection."""
        T, H, D = self.length, self.config.n_head, self.config.head_dim
        formula = f"softmax(q k.T * {self._scale(call.name):.4g} + mask) v, {H} heads"
        flops = H * T * T * (4 * D + 2 + _SOFTMAX_FLOPS)
        name = call.name.replace("out_proj", "heads")
        return self._row(name, formula, call.x, call.x, 0, flops, ops.attention)

    def _scale(self, name: str) -> float:
        return self.model.blocks[int(name.split(".")[1])].attn.heads.scale

    def _activation(self, call: _Call) -> Operation:
        name = call.name.replace("c_proj", self.config.activation)
        flops = _ACTIVATION_FLOPS[self.config.activation] * call.x.numel()
        return self._row(name, f"{self.config.activation}(x)", call.x, call.x, 0, flops,
                         ops.activation)  # fmt: skip

    def _unembedding(self, logits: Tensor) -> Operation:
        rows = self.config.vocab_size * self.config.n_embd
        tied = self.config.tie_word_embeddings
        formula = "x W.T, W being the table of wte" if tied else "x W.T"
        given = (1, self.length, self.config.n_embd)
        flops = 2 * self.length * rows
        return self._row("logits", formula, given, logits, 0 if tied else rows, flops, GPT.logits)

    def _row(
        self,
        name: str,
        formula: str,
        given: Tensor | tuple[int, ...],
        gives: Tensor,
        parameters: int,
        flops: int,
        code: Callable[..., Any],
    ) -> Operation:
        y = gives.numpy()[0].astype(np.float64)
        shape = given if isinstance(given, tuple) else given.shape
        return Operation(
            name,
            formula,
            tuple(int(size) for size in shape[1:]),
            tuple(y.shape),
            parameters,
            int(flops),
            float(np.sqrt((y * y).mean())),
            float(y.min()),
            float(y.max()),
            similarity(y),
            _source(code),
        )


# Of each number, as tinygrad counts what the plain forms compute on a CPU, where an exponential is
# a polynomial of 44 operations, and a softmax computes its exponentials twice.
_ACTIVATION_FLOPS = {"gelu_tanh": 51, "gelu": 69, "relu": 2}
_NORM_FLOPS, _SOFTMAX_FLOPS, _WAVE_FLOPS = 7, 96, 165


def similarity(vectors: np.ndarray) -> float:
    """The mean cosine between two different ones of some vectors: (T, C)."""
    count = len(vectors)
    if count < 2:
        return float("nan")
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1)
    return float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (count * (count - 1)))


def _source(code: Callable[..., Any]) -> str:
    """`layers.py:53`, where the code of a function, or of a class's call, begins."""
    function = code.__call__ if isinstance(code, type) else code
    file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    return f"{Path(file or '').relative_to(Path(tinygpt.__file__).parent).as_posix()}:{line}"


def _closed(operations: list[Operation], block: int | None) -> list[Operation]:
    """The operations, those of each block but the open one put together."""
    found = list[Operation]()
    for key, group in groupby(operations, lambda each: re.match(r"blocks\.\d+|", each.name)[0]):
        inside = list(group)
        if not key or key == f"blocks.{block}":
            found += inside
            continue
        sums = sum(x.parameters for x in inside), sum(x.flops for x in inside)
        last = inside[-1]
        given = next(x.given for x in inside)
        numbers = last.rms, last.lowest, last.highest, last.similarity
        what = "attention, feed-forward, two norms"
        found.append(
            Operation(key, what, given, last.gives, *sums, *numbers, _source(TransformerBlock))
        )
    return found
