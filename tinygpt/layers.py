"""The parts of a GPT-2: attention, feed-forward, layer norm, and the block made of them.

Shapes are written with `B` batch, `T` time (tokens given now), `S` time (tokens seen in all), `C`
channels (n_embd), `H` heads, `D` head_dim. The parts are pure functions of their input and their
weights; `model` stacks them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from tinygrad import Tensor, UOp, dtypes

from tinygpt.config import GPTConfig
from tinygpt.ops.fast import linear, matmul, widen


class Linear:
    """y = x @ weight.T + bias. A weight of int8 has a scale for each row: see `quantization`."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        self.weight = Tensor.empty(out_features, in_features)
        self.bias = Tensor.empty(out_features) if bias else None
        self.scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.scale)


class Embedding:
    """A table of vectors: row i stands for id i."""

    def __init__(self, rows: int, width: int) -> None:
        self.weight = Tensor.empty(rows, width)
        self.scale: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        rows = widen(self.weight[ids])
        return rows if self.scale is None else rows * self.scale[ids].unsqueeze(-1)


class LayerNorm:
    """Each vector shifted to mean 0 and scaled to variance 1, then by a learned scale and shift.

    Source: Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4.
    """

    def __init__(self, width: int, epsilon: float, bias: bool) -> None:
        self.weight = Tensor.empty(width)
        self.bias = Tensor.empty(width) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Tensor) -> Tensor:
        y = x.layernorm(eps=self.epsilon) * self.weight
        return y if self.bias is None else y + self.bias


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
        self.n_head = config.n_head
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.scale = 1.0
        if config.scale_attn_weights:
            self.scale /= math.sqrt(config.head_dim)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x.reshape(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def __call__(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start_pos: int | UOp = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the arguments are those of GPT, the cache this block's part."""
        q, k, v = (self.split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = (_remember(new, old, start_pos) for new, old in zip((k, v), cache, strict=True))
        scores = matmul(q, k, b_transposed=True) * self.scale  # (B, H, T, S)
        mask = _causal_mask(x.shape[1], start_pos, padding)
        if mask is not None:
            scores = mask.where(scores, -math.inf)
        weights = scores.softmax(-1).dropout(self.attn_pdrop)
        y = matmul(weights, v).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.out_proj(y).dropout(self.resid_pdrop)


def _remember(new: Tensor, cache: Tensor, start_pos: int | UOp) -> Tensor:
    """`new` (B, H, T, D) written into the cache at start_pos; the cache up to there: (B, H, S, D).

    The write happens when the result is computed: in place, so that a JIT sees one fixed buffer.
    """
    end = start_pos + new.shape[2]
    write = cache[:, :, start_pos:end].uop.store(new.cast(cache.dtype).uop)
    return Tensor(cache.uop.after(write))[:, :, :end]


def _causal_mask(T: int, start_pos: int | UOp, padding: Tensor | None) -> Tensor | None:
    """True where a query may look: at itself and before, but not at padding. (B or 1, 1, T, S)."""
    if T == 1 and padding is None:
        return None
    S = start_pos + T
    query = (Tensor.arange(T, dtype=dtypes.int32) + start_pos).reshape(1, 1, T, 1)
    key = Tensor.arange(S, dtype=dtypes.int32).reshape(1, 1, 1, S)
    mask = key <= query
    if padding is not None:
        # A padding query may see itself, since a softmax over nothing would be NaN.
        mask = mask & (key >= padding.reshape(-1, 1, 1, 1).minimum(query))
    return mask


class FeedForward:
    """Two linear layers with a nonlinearity between them, the same for every position.

    Source: Vaswani et al. 2017, section 3.3; GELU: Hendrycks and Gimpel 2016, where "gelu_tanh",
    which GPT-2 uses, is the approximation and "gelu" the exact form.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.c_fc = Linear(config.n_embd, config.inner_dim, config.bias)
        self.c_proj = Linear(config.inner_dim, config.n_embd, config.bias)
        self.activation, self.resid_pdrop = config.activation, config.resid_pdrop

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)  # (B, T, inner_dim)
        if self.activation == "relu":
            x = x.relu()
        else:
            x = x.gelu("tanh" if self.activation == "gelu_tanh" else "none")
        # contiguous: computed once, not again for each output channel
        return self.c_proj(x.contiguous()).dropout(self.resid_pdrop)


class TransformerBlock:
    """Attention, then feed-forward, each within a shortcut connection and with a layer norm.

    Pre-norm (GPT-2) normalises what goes into each sublayer; post-norm (the original Transformer)
    normalises the sum that comes out. Without shortcuts the sum is the sublayer's output alone.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias)
        self.attn = MultiHeadAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias)
        self.mlp = FeedForward(config)
        self.pre_norm, self.shortcut = config.norm == "pre", config.shortcut

    def __call__(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start_pos: int | UOp = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the arguments are those of MultiHeadAttention."""
        x = self._sublayer(x, self.ln_1, lambda h: self.attn(h, cache, start_pos, padding))
        return self._sublayer(x, self.ln_2, self.mlp)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """The block's linear layers with their names in it, in the order of their use."""
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"attn.{name}", getattr(self.attn, name)
        for name in ("c_fc", "c_proj"):
            yield f"mlp.{name}", getattr(self.mlp, name)

    def _sublayer(self, x, norm, sublayer) -> Tensor:
        y = sublayer(norm(x).contiguous() if self.pre_norm else x)
        y = x + y if self.shortcut else y
        return (y if self.pre_norm else norm(y.contiguous())).contiguous()
