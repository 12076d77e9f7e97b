"""The assembled GPT: weights and a forward pass, nothing else.

What is generated, trained or loaded stands beside the model and calls it. Shapes are written as in
`layers`, with `V` the vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_parameters, get_state_dict

from tinygpt.config import GPTConfig
from tinygpt.errors import InputError
from tinygpt.layers import Embedding, LayerNorm, Linear, TransformerBlock
from tinygpt.ops.fast import linear
from tinygpt.ops.reading import fast_reading, read_tokens
from tinygpt.runtime.buffers import tensor, write
from tinygpt.runtime.memory import require_memory

# One (keys, values) pair a block, each (B, H, cache length, D): see `GPT.empty_cache`.
Cache = list[tuple[Tensor, Tensor]]


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
    def from_pretrained(cls, name_or_path: str | Path, dtype: str | None = None) -> GPT:
        """A model from a folder, a file or a name: see `load_pretrained`."""
        from tinygpt.checkpoints.open_checkpoint import load_pretrained

        return load_pretrained(name_or_path, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in Hugging Face form: see `save_pretrained`."""
        from tinygpt.checkpoints.save_huggingface import save_pretrained

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
            write(parameter, value)

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
        zeros = np.zeros(shape, np.float32)
        return [(tensor(zeros), tensor(zeros)) for _ in range(self.config.n_layer)]

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

    def read(
        self,
        tokens: Tensor,
        cache: Cache,
        start_pos: UOp,
        padding: Tensor | None = None,
        end: int | UOp | None = None,
    ) -> Tensor:
        """What generating asks of `__call__`: the cache filled, and one position's logits.

        Args:
            tokens: int32 (B, T).
            start_pos: a bound Variable.
            end: the column of tokens whose logits are wanted, or None.
        Returns:
            float32 (B, V); without an end something that need only be realised.
        """
        config = self.config
        head = self.wte if config.tie_word_embeddings else self.lm_head
        weights = [*get_parameters(self.blocks), *get_parameters(self.wte), *get_parameters(head)]
        if Tensor.training or not fast_reading(weights):
            x = self.embed_and_transform(tokens, cache, start_pos, padding)
            if end is None:
                return x
            x = x[:, 0] if tokens.shape[1] == 1 else x[:, end : end + 1].squeeze(1)  # (B, C)
            return self.project(x).float()
        places = self._places(tokens.shape[1], start_pos, padding)
        return read_tokens(
            tokens, self.encode_positions(places), cache, start_pos, padding, end,
            table=get_state_dict(self.wte),
            layers=[get_state_dict(block) for block in self.blocks],
            final=get_state_dict(self.ln_f) if config.norm == "pre" else {},
            head=get_state_dict(head),
            scales=[block.attn.scale for block in self.blocks],
            epsilon=config.layer_norm_epsilon,
            activation=config.activation,
            pre_norm=config.norm == "pre",
            shortcut=config.shortcut,
        )  # fmt: skip

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
        x = self.wte(tokens) + self.encode_positions(self._places(T, start_pos, padding))
        x = x.dropout(self.config.embd_pdrop).contiguous()
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start_pos, padding)
        return self.ln_f(x) if self.config.norm == "pre" else x

    @staticmethod
    def _places(T: int, start_pos: int | UOp, padding: Tensor | None) -> Tensor:
        """The positions of T tokens, counted from where each row's padding ends: (B or 1, T)."""
        time = Tensor.arange(T, dtype=dtypes.int32).reshape(1, T) + start_pos
        return time if padding is None else (time - padding.reshape(-1, 1)).maximum(0)

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
        return linear(x.contiguous(), head.weight, scale=head.scale)
