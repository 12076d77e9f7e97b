"""The parts of a GPT-2: attention, feed-forward, layer norm, and the block made of them.

Shapes are written with `B` batch, `T` time (tokens given now), `S` time (tokens seen in all), `C`
channels (n_embd), `H` heads, `D` head_dim. The parts are pure functions of their input and their
weights, and `model` stacks them. What they compute with is in `ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tinygrad import Tensor

from tinygpt import ops
from tinygpt.config import GPTConfig
from tinygpt.ops.sizes import Position, Whole

# Input and residual, each (B, T, C) -> their sum behind the sublayer, (B, T, C).
Sublayer = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class Record:
    """What a forward pass computes on its way, for whoever wants to look inside.

    Give an empty one to the model. Its lists then hold tensors that are not computed yet:
    `Tensor.realize(*record.hidden_states, *record.attention_weights)` computes them at once.
    """

    # The embeddings, then what each block gives, each (B, T, C). The last layer norm is not in it:
    # the logits come of `model.logits(model.ln_f(x))`, or of x itself in a post-norm model.
    hidden_states: list[Tensor] = field(default_factory=list)
    # Of each block (B, T, C): what its attention gives to its feed-forward, half way through it.
    half_states: list[Tensor] = field(default_factory=list)
    # Of each block (B, H, T, S): how much of each token S every token T takes, adding up to 1.
    attention_weights: list[Tensor] = field(default_factory=list)


class Linear:
    """y = x @ weight.T + bias. A weight of int8 has a scale for each row: see `quantization`."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        self.weight = Tensor.empty(out_features, in_features)
        self.bias = Tensor.empty(out_features) if bias else None
        self.scale: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features), to which the residual is added."""
        return ops.linear(x, self.weight, self.bias, self.scale, residual)


class Embedding:
    """A table of vectors: row i stands for id i."""

    def __init__(self, rows: int, width: int) -> None:
        self.weight = Tensor.empty(rows, width)
        self.scale: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """int32 (...) -> (..., width)."""
        return ops.embedding(ids, self.weight, self.scale)


class LayerNorm:
    """Each vector shifted to mean 0 and scaled to variance 1, then by a learned scale and shift.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.
    """

    def __init__(self, width: int, epsilon: float, bias: bool) -> None:
        self.weight = Tensor.empty(width)
        self.bias = Tensor.empty(width) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return ops.layer_norm(x, self.weight, self.bias, self.epsilon)


class Dropout:
    """Sets a share of its input to zero while a model is trained, which is when there is a key.

    Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting".
    """

    def __init__(self, rate: float, place: int) -> None:
        """
        Args:
            rate: the share.
            place: a number of its own for each Dropout of a model.
        """
        self.rate, self.place = rate, place

    def at(self, key: Tensor | None) -> ops.Dropout | None:
        """What is dropped in the step of this key; None for nothing."""
        return ops.Dropout(self.rate, self.place, key) if key is not None and self.rate else None

    def __call__(self, x: Tensor, key: Tensor | None) -> Tensor:
        """(B, ...) -> (B, ...)."""
        dropout = self.at(key)
        return x if dropout is None else ops.dropout(x, dropout)


def project(
    linear: Linear, x: Tensor, residual: Tensor | None, dropout: Dropout, key: Tensor | None
) -> Tensor:
    """The end of a sublayer: linear(x) with dropout, added to the residual."""
    dropped = dropout.at(key)
    if dropped is None:
        return linear(x, residual)
    return ops.dropout(linear(x), dropped, residual)


class MultiHeadAttention:
    """Causal self-attention with separate query, key and value weights.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        C, bias = config.n_embd, config.bias
        self.q_proj = Linear(C, C, bias)
        self.k_proj = Linear(C, C, bias)
        self.v_proj = Linear(C, C, bias)
        self.out_proj = Linear(C, C, bias)
        self.weights_dropout = Dropout(config.attn_pdrop, 3 * layer + 1)
        self.output_dropout = Dropout(config.resid_pdrop, 3 * layer + 2)
        scale = 1.0
        if config.scale_attn_weights:
            scale /= math.sqrt(config.head_dim)
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        self.heads = ops.Heads(config.n_head, scale)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        start_pos: Position = 0,
        slots: Tensor | None = None,
        row: Whole | None = None,
        key: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), to which the residual of that shape is added.

        The other arguments are those of GPT.hidden_states, the cache this block's part.
        """
        k, v = self.k_proj(x), self.v_proj(x)
        if row is not None:
            x = _column(x, row)
            residual = None if residual is None else _column(residual, row)
        q = self.q_proj(x)
        dropout = self.weights_dropout.at(key)
        seen = None if record is None else record.attention_weights
        y = ops.attention(q, k, v, self.heads, cache, start_pos, slots, row, dropout, seen)
        return project(self.out_proj, y, residual, self.output_dropout, key)


def _column(x: Tensor, row: Whole) -> Tensor:
    """(B, T, C) -> (B, 1, C)."""
    return x[:, row : row + 1].contiguous()


class FeedForward:
    """Two linear layers with a nonlinearity between them, the same for every position.

    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.c_fc = Linear(config.n_embd, config.inner_dim, config.bias)
        self.c_proj = Linear(config.inner_dim, config.n_embd, config.bias)
        self.activation = config.activation
        self.output_dropout = Dropout(config.resid_pdrop, 3 * layer + 3)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), to which the residual of that shape is added."""
        x = ops.activation(self.c_fc(x), self.activation)  # (B, T, inner_dim)
        return project(self.c_proj, x, residual, self.output_dropout, key)


class TransformerBlock:
    """Attention, then feed-forward, each within a shortcut connection and with a layer norm.

    Pre-norm (GPT-2) normalises what goes into each sublayer; post-norm (the original Transformer)
    normalises the sum that comes out, and DeepNorm does so with the residual made larger. Without
    shortcuts the sum is the sublayer's output alone.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias)
        self.attn = MultiHeadAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias)
        self.mlp = FeedForward(config, layer)
        self.pre_norm, self.shortcut = config.norm == "pre", config.shortcut
        self.shortcut_scale = config.shortcut_scale

    def __call__(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start_pos: Position = 0,
        slots: Tensor | None = None,
        row: Whole | None = None,
        key: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or with `row` (B, 1, C); the arguments are those of
        GPT.hidden_states, the cache this block's part."""
        attention = (cache, start_pos, slots, row, key, record)
        x = self._sublayer(x, self.ln_1, lambda h, residual: self.attn(h, residual, *attention))
        if record is not None:
            record.half_states.append(x)
        return self._sublayer(x, self.ln_2, lambda h, residual: self.mlp(h, residual, key))

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """The block's linear layers with their names in it, in the order of their use."""
        for name, part in (("attn", self.attn), ("mlp", self.mlp)):
            for own_name, layer in vars(part).items():
                if isinstance(layer, Linear):
                    yield f"{name}.{own_name}", layer

    def _sublayer(self, x: Tensor, norm: LayerNorm, sublayer: Sublayer) -> Tensor:
        residual = x if self.shortcut_scale == 1 else x * self.shortcut_scale
        y = sublayer(norm(x) if self.pre_norm else x, residual if self.shortcut else None)
        return y if self.pre_norm else norm(y)
