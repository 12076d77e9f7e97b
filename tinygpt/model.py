"""The assembled GPT: weights and a forward pass, nothing else.

What is generated, trained or loaded stands beside the model and calls it. Shapes are written as in
`layers`, with `V` the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt import ops
from tinygpt.config import GPTConfig
from tinygpt.errors import InputError, show
from tinygpt.ids import check_range, read_ids
from tinygpt.layers import Dropout, Embedding, LayerNorm, Linear, Record, TransformerBlock
from tinygpt.ops.sizes import Position, Whole, plus, shape
from tinygpt.placement import Placement
from tinygpt.runtime import device, memory
from tinygpt.runtime.buffers import moved, tensor, write
from tinygpt.runtime.capture import is_capturing
from tinygpt.tokenizer.tokenizer import Tokenizer

# One (keys, values) pair a block, each (B, H, cache length, D): see `GPT.empty_cache`.
Cache = list[tuple[Tensor, Tensor]]

# What the matrices may be held in; bfloat16 is the upper half of a float32: see `ops.widen`.
DTYPES = {
    "float32": dtypes.float32,
    "float16": dtypes.float16,
    "bfloat16": dtypes.uint16,
    "int8": dtypes.int8,
}

# What a user is told of logits among which nothing can be chosen.
NOT_NUMBERS = (
    "the model's logits are not finite numbers: its weights have diverged or are damaged; take an "
    "earlier checkpoint, or train again with a lower learning rate"
)


class GPT:
    """A stack of transformer blocks over token embeddings and positional encodings.

    Its only state is its weights: `tinygrad.nn.state.get_state_dict(model)` names them all.

    Attributes:
        name: what it was loaded by; None of a new one.
    """

    # What is no weight stands beside `vars(model)`, which is what a captured step depends on.
    __slots__ = ("__dict__", "__weakref__", "_tokenizer", "name")
    name: str | None
    _tokenizer: Tokenizer | Callable[[], Tokenizer] | None  # or what reads it when it is asked for

    def __init__(
        self, config: GPTConfig, seed: int | None = 0, init: Literal["gpt2", "xavier"] = "gpt2"
    ) -> None:
        """
        Args:
            config: the shape of the model.
            seed: of the random initial weights, the same on every backend; None leaves the weights
                without values, for a caller that gives each its own.
            init: see `init_weights`.
        """
        device.select()  # before the first tensor is made
        if seed is not None:  # check first: even the empty blocks of 1,000 layers cost time
            # Of the largest matrix there is a copy while it is drawn.
            largest = config.n_embd * max(config.vocab_size, config.block_size, config.inner_dim)
            memory.require_memory(4 * (config.parameter_count + largest), "a model of this shape")
        self.name = self._tokenizer = None
        self.config = config
        self.placement = Placement(config)
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        self.dropout = Dropout(config.embd_pdrop, place=0)
        self.blocks = [TransformerBlock(config, layer) for layer in range(config.n_layer)]
        if config.norm == "pre":  # post-norm has already normalised what the last block gives
            self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed, init)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, dtype: str | None = None) -> GPT:
        """A model from a folder, a file or a name: see `load_pretrained`."""
        from tinygpt.checkpoints.open_checkpoint import load_pretrained

        if not isinstance(name_or_path, str | Path):
            raise InputError(f"the model is {show(name_or_path)}: give a name or a path")
        device.select()
        return load_pretrained(name_or_path, dtype)

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write the model in Hugging Face form, and its tokenizer: see `save_pretrained`."""
        from tinygpt.checkpoints.save_huggingface import save_pretrained

        if tokenizer is None and self._tokenizer is not None:
            with suppress(InputError):  # one that cannot be read is no reason to keep the model
                tokenizer = self.tokenizer
        save_pretrained(self, folder, tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids of this model and back; it may be set.

        Raises:
            InputError: when the model was not loaded, or brings none that can be used.
        """
        if self._tokenizer is None:
            raise InputError(
                "a new model has no tokenizer: set one, as in "
                'model.tokenizer = load_tokenizer("bytes", model.config.vocab_size)'
            )
        if callable(self._tokenizer):
            self._tokenizer = self._tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | Callable[[], Tokenizer]) -> None:
        if not isinstance(tokenizer, Tokenizer) and not callable(tokenizer):
            raise InputError(
                f"model.tokenizer is {show(tokenizer)}: set a tokenizer, as from load_tokenizer"
            )
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        name = "" if self.name is None else f"{self.name!r}, "
        held = next(name for name, dtype in DTYPES.items() if dtype == self.wte.weight.dtype)
        return f"GPT({name}{self.config.parameter_count:,} parameters, {held}, {self.config!r})"

    def init_weights(self, seed: int, init: Literal["gpt2", "xavier"] = "gpt2") -> None:
        """Draw new weights on the host, so that every backend gets the same.

        All matrices are normal; norms begin as the identity, biases at zero.

        Args:
            init: "gpt2": of standard deviation `initializer_range`, and those that add to the
                residual stream smaller by 1/sqrt(2 n_layer). "xavier": of variance 2/(in + out),
                in DeepNorm's blocks with its gain, and embeddings that add up to variance 1;
                where they are the output projection too, they are as in GPT-2.
        Source: Radford et al. 2019, section 2.3; Glorot and Bengio 2010; Wang et al. 2022.
        """
        self.placement.need_whole()
        rng = np.random.default_rng(seed)
        for name, parameter in get_state_dict(self).items():
            if parameter.ndim == 2:
                scale = self._deviation(name, parameter.shape, init)
                value = rng.standard_normal(parameter.shape, dtype=np.float32)
                value *= scale
            else:
                value = np.full(parameter.shape, float(name.endswith("weight")), np.float32)
            write(parameter, value)

    def _deviation(self, name: str, shape: Sequence[Any], init: str) -> float:
        """The standard deviation of a new matrix: see `init_weights`."""
        layers, own = self.config.n_layer, name.removesuffix(".weight").rpartition(".")[2]
        inside = name.startswith("blocks.")
        if init == "xavier" and (inside or not self.config.tie_word_embeddings):
            if own in ("wte", "wpe"):
                return math.sqrt(1 / 2)
            deep = self.config.norm == "deep" and inside and own not in ("q_proj", "k_proj")
            return math.sqrt(2 / sum(shape)) * ((8 * layers) ** -0.25 if deep else 1)
        residual = 1 / math.sqrt(2 * layers) if own in ("out_proj", "c_proj") else 1
        return self.config.initializer_range * residual

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Room for the keys and values of `length` positions: a zeroed (B, H, length, D) pair each.

        It is zeroed because what is read past the end is masked by a factor of 0, which would not
        hide a NaN.

        Raises:
            InputError: when the machine has too little memory for it.
        """
        self.require_cache_memory(batch_size, length)
        zeros = np.broadcast_to(np.float32(0), self._cache_shape(batch_size, length))
        place, layers = self.placement, range(self.config.n_layer)
        return [(place.cache(i, zeros), place.cache(i, zeros)) for i in layers]

    def require_cache_memory(self, batch_size: int, length: int) -> None:
        """Refuse a cache that would not fit into memory: see `empty_cache`."""
        size_bytes = 8 * self.config.n_layer * math.prod(self._cache_shape(batch_size, length))
        size_bytes += 4 * batch_size * self.config.vocab_size  # the logits of each
        self.placement.require_memory(size_bytes, f"the cache for a batch of {batch_size}")

    def _cache_shape(self, batch_size: int, length: int) -> tuple[int, ...]:
        return batch_size, self.config.n_head, length, self.config.head_dim

    def __call__(
        self,
        tokens: Any,
        cache: Cache | None = None,
        start_pos: Position = 0,
        slots: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Logits for the token after each position: (B, T) -> float32 (B, T, V).

        The arguments are those of `hidden_states`.
        """
        return self.logits(self.hidden_states(tokens, cache, start_pos, slots, record=record))

    def hidden_states(
        self,
        tokens: Any,
        cache: Cache | None = None,
        start_pos: Position = 0,
        slots: Tensor | None = None,
        row: Whole | None = None,
        key: Tensor | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """All of the forward pass but the output projection.

        Args:
            tokens: ids in [0, vocab_size), (B, T) or for one row (T,): a tensor, an array or lists.
            cache: from `empty_cache`; the tokens' keys and values are written into it, and those
                before start_pos are read from it. None: the tokens stand alone.
            start_pos: position of tokens[:, 0]; a bound tinygrad Variable compiles once for all.
                int32 (B,): one for each row; where one would reach past the cache, or is negative,
                nothing is written and its result is NaN.
            slots: int32 (B,), each another one: which row of the cache each row takes, where
                start_pos has one for each. None: its own, the cache having B.
            row: compute what comes out for this column of tokens alone; the last block skips the
                others. None: for all.
            key: uint32 (4,), for training: what dropout draws from, which is seed, step, the
                number of the batch's first row, and how far that of the next is; (N, 4) where N
                devices have a part of the batch each. None: nothing is dropped.
            record: an empty one, to be filled with what is computed on the way.
        Returns:
            float32 (B, T, C), or (B, 1, C) with `row`.
        Raises:
            InputError: when the tokens are no ids of the vocabulary, or reach past the window.
        """
        tokens = self.ids(tokens)
        T = shape(tokens)[1]
        if isinstance(start_pos, int) and start_pos + T > self.config.block_size:
            raise InputError(
                f"tokens at positions {start_pos} to {start_pos + T - 1} reach past the window "
                f"of {self.config.block_size}: give fewer, or slide the window"
            )
        here = self.placement.rest
        tokens, start_pos = moved(tokens, here), moved(start_pos, here)
        starts = start_pos.reshape(-1, 1) if isinstance(start_pos, Tensor) else start_pos
        places = Tensor.arange(T, dtype=dtypes.int32, device=tokens.device).reshape(1, T)
        x = self.wte(tokens) + self.encode_positions(plus(places, starts))
        x = self.dropout(x.contiguous(), key)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            last_row, here = row if i == len(self.blocks) - 1 else None, self.placement.block(i)
            x, key = moved(x, here), moved(key, here)
            start_pos, slots = moved(start_pos, here), moved(slots, here)
            if record is not None:
                record.hidden_states.append(x)
            part = None if cache is None else cache[i]
            x = block(x, part, start_pos, slots, last_row, key, record)
        if record is not None:
            record.hidden_states.append(x)
        x = moved(x, self.placement.rest)
        return self.ln_f(x) if self.config.norm == "pre" else x

    def ids(self, given: Any) -> Tensor:
        """What is given as tokens, as int32 (B, T).

        Values are not looked at while a step is captured: there are none yet.

        Raises:
            InputError: for what is no ids, or none of this vocabulary.
        """
        if is_capturing():
            return given.cast(dtypes.int32)
        ids = read_ids(given)
        check_range(ids, self.config.vocab_size)
        if ids.ndim not in (1, 2):
            raise InputError(f"tokens have {ids.ndim} axes: give (B, T), or (T,) for one row")
        rows = ids.reshape(-1, ids.shape[-1])
        if isinstance(given, Tensor):
            return given.reshape(rows.shape).cast(dtypes.int32)
        return tensor(rows.astype(np.int32))

    def encode_positions(self, positions: Tensor) -> Tensor:
        """int32 (..., T) -> (..., T, C): learned rows, or the fixed waves of Vaswani et al. 3.5."""
        if self.config.position == "learned":
            return self.wpe(positions)
        half = self.config.n_embd // 2
        rates = (Tensor.arange(half, device=positions.device) * (-math.log(10000.0) / half)).exp()
        angles = positions.unsqueeze(-1) * rates  # (..., T, C/2)
        return Tensor.stack(angles.sin(), angles.cos(), dim=-1).flatten(-2)

    def logits(self, x: Tensor) -> Tensor:
        """The output projection, or unembedding: (..., C) -> (..., V)."""
        weight, scale = self._unembedding
        logits = ops.linear(moved(x, self.placement.rest), weight, scale=scale)
        return self.placement.on_one(logits, axis=-1)

    def losses(self, tokens: Any, targets: Any, key: Tensor | None = None) -> Tensor:
        """The cross entropy of each target, in nats, through which gradients go.

        Args:
            tokens, targets: ids of one shape, as in `hidden_states`.
            key: as in `hidden_states`.
        Returns:
            float32 (B, T).
        Raises:
            InputError: as from `hidden_states`.
        """
        tokens, targets = self.ids(tokens), self.ids(targets)
        if tokens.shape != targets.shape:
            raise InputError(
                f"tokens are {tokens.shape} and targets {targets.shape}: each token has one target"
            )
        x = self.hidden_states(tokens, key=key)
        weight, scale = self.placement.joined(*self._unembedding)
        x, targets = moved(x, weight.device), moved(targets, weight.device)
        return ops.cross_entropy(x, weight, targets, scale)

    @property
    def _unembedding(self) -> tuple[Tensor, Tensor | None]:
        head = self.wte if self.config.tie_word_embeddings else self.lm_head
        return head.weight, head.scale
