"""GPT-2 from its components: weights and a forward pass, nothing else.

Shapes are written with `B` batch, `T` time (tokens given now), `S` time (tokens seen in all), `C`
channels (n_embd), `H` heads, `D` head_dim, `V` vocabulary. What is generated, trained or loaded
stands beside the model and calls it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt.backend import require_memory
from tinygpt.config import GPTConfig, InputError
from tinygpt.kernels import fast, linear, matmul, transformer_block

# One (keys, values) pair a block, each (B, H, cache length, D): see `GPT.empty_cache`.
Cache = list[tuple[Tensor, Tensor]]


class Linear:
    """y = x @ weight.T + bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        self.weight = Tensor.empty(out_features, in_features)
        self.bias = Tensor.empty(out_features) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding:
    """A table of vectors: row i stands for id i."""

    def __init__(self, rows: int, width: int) -> None:
        self.weight = Tensor.empty(rows, width)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


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
        self.form = {  # what the fast form of all this needs to know besides the weights
            "n_head": config.n_head,
            "scale": self.attn.scale,
            "epsilon": config.layer_norm_epsilon,
            "activation": config.activation,
            "pre_norm": self.pre_norm,
            "shortcut": self.shortcut,
        }

    def __call__(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start_pos: int | UOp = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the arguments are those of MultiHeadAttention."""
        weights = get_state_dict(self)
        generating = cache is not None and isinstance(start_pos, UOp) and not Tensor.training
        if generating and fast(x, *cache, *weights.values()):
            return transformer_block(x, weights, cache, start_pos, padding, **self.form)
        x = self._sublayer(x, self.ln_1, lambda h: self.attn(h, cache, start_pos, padding))
        return self._sublayer(x, self.ln_2, self.mlp)

    def _sublayer(self, x, norm, sublayer) -> Tensor:
        y = sublayer(norm(x).contiguous() if self.pre_norm else x)
        y = x + y if self.shortcut else y
        return (y if self.pre_norm else norm(y.contiguous())).contiguous()


class GPT:
    """A stack of transformer blocks over token embeddings and positional encodings.

    Its only state is its weights: `tinygrad.nn.state.get_state_dict(model)` names them all.
    """

    def __init__(self, config: GPTConfig, seed: int | None = 0) -> None:
        """
        Args:
            config: the shape of the model.
            seed: of the random initial weights, the same on every backend; None leaves the weights
                without values, for a caller that gives each its own.
        """
        if seed is not None:  # before so much as the blocks of a thousand layers are made
            require_memory(4 * config.parameter_count, "a model of this shape")
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        self.blocks = [TransformerBlock(config, layer) for layer in range(config.n_layer)]
        if config.norm == "pre":  # post-norm has already normalised what the last block gives
            self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> GPT:
        """A model from a folder or a name in Hugging Face form: see `weights.load_pretrained`."""
        from tinygpt.weights import load_pretrained

        return load_pretrained(name_or_path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in Hugging Face form: see `weights.save_pretrained`."""
        from tinygpt.weights import save_pretrained

        save_pretrained(self, folder)

    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation, drawn on the host so that every backend gets the same weights.

        Matrices are normal with standard deviation `initializer_range`, and those that add to the
        residual stream smaller by 1/sqrt(2 n_layer); norms begin as the identity, biases at zero.
        Source: Radford et al. 2019, section 2.3.
        """
        rng = np.random.default_rng(seed)
        residual = 1 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in get_state_dict(self).items():
            if parameter.ndim == 2:
                scale = self.config.initializer_range
                scale *= residual if name.endswith(("out_proj.weight", "c_proj.weight")) else 1
                value = rng.standard_normal(parameter.shape, dtype=np.float32)
                value *= scale
            else:
                value = np.full(parameter.shape, float(name.endswith("weight")), np.float32)
            parameter.replace(Tensor(value).to(parameter.device)).realize()

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Room for the keys and values of `length` positions: a zeroed (B, H, length, D) pair each.

        Zeroed, because what is read past the end is masked by a factor of 0, which would not
        hide a NaN.

        Raises:
            InputError: when the machine has too little memory for it.
        """
        shape = (batch_size, self.config.n_head, length, self.config.head_dim)
        size_bytes = 8 * self.config.n_layer * math.prod(shape)
        require_memory(size_bytes, f"the cache for a batch of {batch_size}")
        pairs = [
            tuple(Tensor.zeros(*shape).contiguous() for _ in range(2))
            for _ in range(self.config.n_layer)
        ]
        Tensor.realize(*[tensor for pair in pairs for tensor in pair])
        return pairs

    def __call__(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        start_pos: int | UOp = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Logits for the token after each position.

        Args:
            tokens: int (B, T), ids in [0, vocab_size).
            cache: from `empty_cache`; the tokens' keys and values are written into it, and those
                before start_pos are read from it. None: the tokens stand alone.
            start_pos: position of tokens[:, 0]; a bound tinygrad Variable compiles once for all.
            padding: int (B,): how many tokens at the left of each row are padding, to be ignored.
        Returns:
            float (B, T, V).
        Raises:
            InputError: when the tokens reach past the window.
        """
        return self.project(self.embed_and_transform(tokens, cache, start_pos, padding))

    def embed_and_transform(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        start_pos: int | UOp = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """All of the forward pass but the output projection: int (B, T) -> float (B, T, C)."""
        T = tokens.shape[1]
        if isinstance(start_pos, int) and start_pos + T > self.config.block_size:
            raise InputError(
                f"tokens at positions {start_pos} to {start_pos + T - 1} reach past the window "
                f"of {self.config.block_size}: give fewer, or slide the window"
            )
        time = Tensor.arange(T, dtype=dtypes.int32).reshape(1, T) + start_pos  # (1, T)
        places = time if padding is None else (time - padding.reshape(-1, 1)).maximum(0)  # (B, T)
        x = self.wte(tokens) + self.encode_positions(places)
        x = x.dropout(self.config.embd_pdrop).contiguous()
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start_pos, padding)
        return self.ln_f(x) if self.config.norm == "pre" else x

    def encode_positions(self, places: Tensor) -> Tensor:
        """int (..., T) -> (..., T, C): learned rows, or the fixed waves of Vaswani et al. 3.5."""
        if self.config.position == "learned":
            return self.wpe(places)
        half = self.config.n_embd // 2
        rates = (Tensor.arange(half) * (-math.log(10000.0) / half)).exp()
        angles = places.unsqueeze(-1) * rates  # (..., T, C/2)
        return Tensor.stack(angles.sin(), angles.cos(), dim=-1).flatten(-2)

    def project(self, x: Tensor) -> Tensor:
        """The output projection: (..., C) -> logits (..., V)."""
        head = self.wte if self.config.tie_word_embeddings else self.lm_head
        return linear(x.contiguous(), head.weight)


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
