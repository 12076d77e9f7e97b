"""The operations that `layers`, `model` and the optimisers are made of, one function each.

Each has three forms that tests hold equal: its definition in plain tensors (`plain`), C where clang
compiles for the CPU (`fast`), and a gradient of either. The functions here choose. Shapes: `B`
batch, `T` time, `C` channels, `H` heads, `D` head_dim, `V` vocabulary, `...` any sizes.
"""

from __future__ import annotations

from types import ModuleType

from tinygrad import Tensor

from tinygpt.ops import fast, plain
from tinygpt.ops.plain import Dropout, Heads, widen
from tinygpt.ops.sizes import Position, Whole

__all__ = [
    "Dropout",
    "Heads",
    "activation",
    "adamw",
    "attention",
    "cross_entropy",
    "dropout",
    "embedding",
    "gumbel",
    "layer_norm",
    "linear",
    "matmul",
    "sum_of_squares",
    "threshold",
    "widen",
]


def _form(*tensors: Tensor) -> ModuleType:
    """Where an operation on these tensors is defined: in C if that can take them."""
    return fast if fast.usable(*tensors) else plain


def matmul(a: Tensor, b: Tensor, a_transposed: bool = False, b_transposed: bool = False) -> Tensor:
    """a @ b, of which either may be given transposed.

    Args:
        a: float32 (..., M, K), or (..., K, M) if a_transposed.
        b: (..., K, N), or (..., N, K) if b_transposed; the same leading sizes as a. A dtype
            narrower than float32 is widened, and then there are no gradients.
    Returns:
        float32 (..., M, N).
    """
    return _form(a, b).matmul(a, b, a_transposed, b_transposed)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x @ weight.T * scale + bias + residual.

    Args:
        x: float32 (..., in_features).
        weight: (out_features, in_features) of any dtype of `checkpoints.quantization`. One narrower
            than float32 is widened, and then there are no gradients.
        bias: float32 (out_features,).
        scale: float32 (out_features,), of a weight in int8.
        residual: float32 (..., out_features).
    Returns:
        float32 (..., out_features).
    """
    return _form(x, weight).linear(x, weight, bias, scale, residual)


def activation(x: Tensor, kind: str) -> Tensor:
    """The nonlinearity of the feed-forward, by its name in GPTConfig: float32 (...) -> (...).

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units": "gelu" is the exact form, and
    "gelu_tanh", which GPT-2 uses, the approximation.
    """
    return _form(x).activation(x, kind)


def embedding(ids: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor:
    """Rows of a table; an id that it does not have gives NaN.

    Args:
        ids: int32 (...).
        table: (V, C), of any dtype as in `linear`.
        scale: float32 (V,), of a table in int8.
    Returns:
        float32 (..., C).
    """
    return _form(ids, table).embedding(ids, table, scale)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Each vector shifted to mean 0 and scaled to variance 1, then times weight, plus bias.

    Args:
        x: float32 (..., C).
        weight, bias: float32 (C,).
    Returns:
        float32 (..., C).
    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.
    """
    return _form(x, weight).layer_norm(x, weight, bias, epsilon)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    cache: tuple[Tensor, Tensor] | None = None,
    start_pos: Position = 0,
    slots: Tensor | None = None,
    row: Whole | None = None,
    dropout: Dropout | None = None,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Causal attention of several heads, which lie beside each other in the channels.

    Args:
        q: float32 (B, M, C): a query for each of the T tokens, or with `row` for that one alone.
        k, v: float32 (B, T, C).
        heads: how many there are, and what scores are multiplied with.
        cache: keys and values, each (N, H, S, D): k and v are written into it at start_pos, and
            what stands before is read. None: the tokens stand alone.
        start_pos: position of the first token; a bound Variable compiles once for all. int32 (B,):
            one for each row.
        slots: int32 (B,), each another one: which row of the cache each row takes, where start_pos
            has one for each; None: its own, N being B.
        row: the one column of k whose query q is, M being 1.
        dropout: of the weights; only without a cache.
        weights: a list that the attention weights, float32 (B, H, M, S), are added to. The plain
            form has them; the C forms never make the whole of them.
    Returns:
        float32 (B, M, C).
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    if weights is None and fast.usable(q, k, v):
        if cache is not None:
            return fast.attention_cached(q, k, v, heads, cache, start_pos, slots, row)
        if row is None:
            return fast.attention(q, k, v, heads, dropout)
    return plain.attention(q, k, v, heads, cache, start_pos, slots, row, dropout, weights)


def dropout(x: Tensor, dropout: Dropout, residual: Tensor | None = None) -> Tensor:
    """x with a share of its numbers set to zero and the others scaled up, plus the residual.

    Args:
        x: float32 (B, ...).
        residual: of the shape of x.
    """
    return _form(x).dropout(x, dropout, residual)


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The loss in nats of each target under softmax(x @ weight.T * scale); NaN for no token.

    Args:
        x: float32 (..., C).
        weight, scale: as in `linear`, (V, C) and (V,).
        targets: int32 (...).
    Returns:
        float32 (...).
    """
    return _form(x, weight).cross_entropy(x, weight, targets, scale)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """The sum of the squares of all numbers in some float32 tensors, a scalar."""
    return _form(*tensors).sum_of_squares(tensors)


def adamw(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    inputs: Tensor,
    decay: float,
    betas: tuple[float, float],
) -> None:
    """Move a parameter and its two running means, in place once they are realised.

    Args:
        parameter, mean, square, gradient: float32 of one shape.
        inputs: float32 (5,): rate; rate over the first bias correction; root of the second; the
            factor of the gradient; and 0 to change nothing.
        decay: pull towards zero, as a share of the rate.
        betas: memory of the two means.
    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """
    _form(parameter, gradient).adamw(parameter, mean, square, gradient, inputs, decay, betas)


def threshold(order: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The largest t for which the weights where order >= t sum to the target, or 0, for each row.

    Args:
        order: uint32 (B, V).
        weights: float (B, V).
        target: (B, 1), or (1,) for all rows.
    Returns:
        uint32 (B, 1).
    """
    return _form(order, weights).threshold(order, weights, target)


def gumbel(seeds: Tensor, draw: Tensor, size: int) -> Tensor:
    """Gumbel noise: the argmax of logits plus it is a draw from their softmax.

    The generator is Threefry, as tinygrad has it, a pure function of (seed, draw, place): a row
    draws the same whatever stands beside it. Source: Maddison et al. 2014, "A* Sampling",
    section 2.

    Args:
        seeds: uint64 (B,).
        draw: int32 (B,), from 0.
    Returns:
        float32 (B, size).
    """
    return _form(seeds, draw).gumbel(seeds, draw, size)
