"""The operations as their definitions in plain tensors, which run on every backend.

Shapes: `B` batch, `T` time (tokens given now), `S` time (tokens seen in all), `C` channels, `H`
heads, `D` head_dim, `V` vocabulary. Arguments are those of the functions in `ops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinygrad import Tensor, dtypes

from tinygpt.ops.sizes import Position, Whole, plus, shape
from tinygpt.runtime import buffers

# tinygrad vectorises and threads a kernel along an axis whose length its factors divide. GPT-2's
# 50257 rows are 29 * 1733: as they stand, that product runs several times slower.
_EVEN = 32


@dataclass(frozen=True)
class Dropout:
    """One place where a step drops numbers: which share of them, and what decides on which."""

    rate: float
    place: int  # a number of its own for each place in the model
    # uint32 (4,): seed, step, the number of the batch's first row, and how far that of the next is.
    # Of a batch that N devices share in equal parts, (N, 4): one for each part.
    key: Tensor

    @property
    def threshold(self) -> int:
        """A number is kept where its 32 random bits are no less than this."""
        return round(self.rate * 2**32)

    @property
    def scale(self) -> float:
        """What kept numbers are multiplied with, so that their mean stays the same."""
        return 1 / (1 - self.rate)


@dataclass(frozen=True)
class Heads:
    """How attention is cut into heads, and what they see. C takes each field by its name."""

    n_head: int
    scale: float  # what scores are multiplied with


def widen(weight: Tensor) -> Tensor:
    """A weight of any dtype as float32, its scale not yet applied.

    bfloat16, the upper half of a float32, is held as uint16: so it works on every backend.
    """
    if weight.dtype == dtypes.uint16:
        return (weight.cast(dtypes.uint32) * 2**16).bitcast(dtypes.float32)
    return weight.float()


def matmul(a: Tensor, b: Tensor, a_transposed: bool, b_transposed: bool) -> Tensor:
    b = widen(b)
    a = a.transpose(-2, -1) if a_transposed else a
    return a @ (b.transpose(-2, -1) if b_transposed else b)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    rows = shape(weight)[0]
    even = rows - rows % _EVEN
    if even in (0, rows) or isinstance(weight.device, tuple):  # which has it in parts already
        y = x @ widen(weight).transpose()
    else:  # an awkward number of rows is cut in two
        parts = (widen(weight[:even]), widen(weight[even:]))
        y = Tensor.cat(*[(x @ part.transpose()).contiguous() for part in parts], dim=-1)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y if residual is None else (y + residual).contiguous()


def activation(x: Tensor, kind: str) -> Tensor:
    forms = {
        "gelu_tanh": lambda: x.gelu("tanh"),
        "gelu": lambda: x.gelu("none"),
        "relu": x.relu,
    }
    return forms[kind]().contiguous()  # computed once, not again for each output channel


def embedding(ids: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    rows = widen(table[ids])
    rows = rows if scale is None else rows * scale[ids].unsqueeze(-1)
    known = (ids >= 0) & (ids < shape(table)[0])
    return known.unsqueeze(-1).where(rows, math.nan)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    y = x.layernorm(eps=epsilon) * weight
    return (y if bias is None else y + bias).contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    cache: tuple[Tensor, Tensor] | None,
    start_pos: Position,
    slots: Tensor | None,
    row: Whole | None,
    dropout: Dropout | None,
    seen: list[Tensor] | None = None,
) -> Tensor:
    T = shape(k)[1]
    mask = _causal_mask(q, T, cache, start_pos, row)
    q, k, v = (x.reshape(*shape(x)[:2], heads.n_head, -1).transpose(1, 2) for x in (q, k, v))
    if cache is not None:
        k, v = (_remember(x, old, start_pos, slots) for x, old in zip((k, v), cache, strict=True))
    weights = attention_weights(q, k, heads.scale, mask)
    if seen is not None:
        weights = weights.contiguous()  # or they are computed anew for each channel of the result
        seen.append(weights)
    if dropout is not None:
        weights = drop(weights, dropout)
    y = matmul(weights, v, False, False).transpose(1, 2).flatten(2)  # (B, H, M, D) -> (B, M, C)
    if isinstance(start_pos, Tensor) and cache is not None:  # a row outside of the cache is none
        inside = (start_pos >= 0) & (start_pos + T <= shape(cache[0])[2])
        y = inside.reshape(-1, 1, 1).where(y, math.nan)
    return y


def attention_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """How much of each key every query takes, each row adding up to 1.

    Args:
        q: float32 (B, H, M, D).
        k: float32 (B, H, S, D).
        mask: bool (B or 1, 1, M, S), true where a query may look; None: everywhere.
    Returns:
        float32 (B, H, M, S).
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    scores = matmul(q, k, False, True) * scale
    return (scores if mask is None else mask.where(scores, -math.inf)).softmax(-1)


def _counted(size: Position, like: Tensor, dtype: Any = dtypes.int32) -> Tensor:
    """The whole numbers from 0, where another tensor lies: (size,)."""
    return Tensor.arange(size, dtype=dtype, device=like.device)


def _causal_mask(
    q: Tensor,
    T: int,
    cache: tuple[Tensor, Tensor] | None,
    start_pos: Position,
    row: Whole | None,
) -> Tensor | None:
    """True where a query may look: at itself and before. (B or 1, 1, M, S)."""
    M, own_starts = shape(q)[1], isinstance(start_pos, Tensor)
    if T == 1 and not own_starts:
        return None
    start = start_pos.reshape(-1, 1, 1, 1) if isinstance(start_pos, Tensor) else start_pos
    S = shape(cache[0])[2] if own_starts and cache is not None else start_pos + T
    query = plus(_counted(M, q).reshape(1, 1, M, 1), start)
    query = query if row is None or M == T else plus(query, row)
    key = _counted(S, q).reshape(1, 1, 1, S)
    return key <= query


def _remember(new: Tensor, cache: Tensor, start_pos: Position, slots: Tensor | None) -> Tensor:
    """`new` (B, H, T, D) written into the cache at start_pos; its rows up to there: (B, H, S, D).

    The write happens when the result is computed: in place, so that a JIT sees one fixed buffer.
    """
    T, new = shape(new)[2], new.cast(cache.dtype)
    if isinstance(start_pos, Tensor):
        own = _counted(shape(new)[0], new) if slots is None else slots
        done = buffers.scattered(cache, new, start_pos, own)
        return done if slots is None else done[slots]
    end = start_pos + T
    return buffers.written(cache, cache[:, :, start_pos:end], new)[:, :, :end]


def dropout(x: Tensor, dropout: Dropout, residual: Tensor | None) -> Tensor:
    y = drop(x, dropout)
    return y if residual is None else y + residual


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """x with a share of its numbers set to zero, and the others scaled up.

    Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting".
    """
    kept = dropout_bits(dropout, shape(x)) >= dropout.threshold
    return kept.where(x * dropout.scale, 0)


def dropout_bits(dropout: Dropout, shape: Sequence[int]) -> Tensor:
    """uint32 of a shape whose first axis is the batch: a function of the key, the place, and the
    number of each element, counted by the numbers of rows that the key tells.

    So a mask is the same on every backend, in C (dropout.h), and however a batch is divided.
    """
    key = dropout.key.reshape(-1, 4, 1)  # one for each equal part of the batch, (N, 4, 1)
    rows, size = shape[0] // len(key), math.prod(shape[1:])
    first = _mix(_mix(_mix(key[:, 0]) + key[:, 1]) + dropout.place)
    second = _mix(first + 0x9E3779B9)
    row = key[:, 2] + _counted(rows, key, dtypes.uint32) * key[:, 3]  # (N, rows)
    index = row.unsqueeze(-1) * size + _counted(size, key, dtypes.uint32)  # (N, rows, size)
    return _mix(_mix(index ^ first.unsqueeze(-1)) + second.unsqueeze(-1)).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    """A bijection of uint32 in which every bit moves every other. Source: dropout.h."""
    x = (x ^ x.rshift(16)) * 0x7FEB352D
    x = (x ^ x.rshift(15)) * 0x846CA68B
    return x ^ x.rshift(16)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    logits = linear(x, weight, None, scale, None).contiguous()
    losses = logits.sparse_categorical_crossentropy(targets, reduction="none")
    known = (targets >= 0) & (targets < shape(weight)[0])
    return known.where(losses, math.nan)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return Tensor.stack(*[tensor.square().sum() for tensor in tensors]).sum()


def adamw(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    inputs: Tensor,
    decay: float,
    betas: tuple[float, float],
) -> None:
    rate, adam_rate, root, clip, good = (inputs[i] for i in range(5))
    gradient, good = gradient * clip, good != 0
    for average, beta, value in ((mean, betas[0], gradient), (square, betas[1], gradient.square())):
        average.assign(good.where(average * beta + value * (1 - beta), average))
    old = parameter.detach()
    direction = mean / (square.sqrt() / root + 1e-8)
    new = old * (1 - rate * decay) - adam_rate * direction
    parameter.assign(good.where(new, old))


def threshold(order: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    # A sort of the vocabulary would take over a hundred kernels. This takes 32 runs of one: the
    # bit under trial is the candidate's lowest set bit.
    candidate = Tensor.full((shape(order)[0], 1), 2**31, dtype=dtypes.uint32, device=order.device)
    candidate = candidate.contiguous()
    for _ in range(32):
        bit = candidate & ((candidate ^ 0xFFFFFFFF) + 1)
        reached = (order >= candidate).where(weights, 0).sum(-1, keepdim=True) >= target
        candidate = (reached.where(candidate, candidate - bit) + bit // 2).contiguous()
    return candidate


def gumbel(seeds: Tensor, draw: Tensor, size: int) -> Tensor:
    places = _counted((size + 1) // 2, seeds, dtypes.uint32).cast(dtypes.uint64)
    counters = places + draw.cast(dtypes.uint64).reshape(-1, 1) * 2**32
    pairs = counters.threefry(seeds.reshape(-1, 1))  # (B, size / 2) of 64 bits
    bits = Tensor.cat((pairs & 0xFFFFFFFF), pairs.rshift(32), dim=-1)[:, :size]
    # The middle of one of 2**23 equal steps: never 0 or 1, where a logarithm would be infinite.
    # Of 2**24 steps float32 cannot say the middles: the last would be 1.
    uniform = (bits.cast(dtypes.uint32).rshift(9).cast(dtypes.float32) + 0.5) * 2**-23
    # Near 1, where the largest noise comes from, a GPU's logarithm may be off by more than its
    # value: there it is its series.
    rest = 1 - uniform
    series = rest / 6 + 1 / 5
    for n in (4, 3, 2, 1):
        series = series * rest + 1 / n
    return -(rest < 1 / 8).where(series * rest, -uniform.log()).log()
