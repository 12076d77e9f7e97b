"""What a GPT is made of, as plain numbers: the configuration, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from tinygpt.errors import InputError, show, unknown

_CHOICES = {
    "norm": ("pre", "post"),
    "position": ("learned", "sinusoidal"),
    "activation": ("gelu_tanh", "gelu", "relu"),
}
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_FLAGS = (
    "bias",
    "shortcut",
    "tie_word_embeddings",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Frozen; a value that cannot work raises InputError, naming it.

    The defaults are GPT-2 124M. Names follow GPT-2's published `config.json` where it has one.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # the window: how many tokens the model sees at once
    vocab_size: int = 50257
    n_inner: int | None = None  # width of the feed-forward's inner layer; None is 4 * n_embd
    norm: Literal["pre", "post"] = "pre"
    position: Literal["learned", "sinusoidal"] = "learned"
    activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"
    bias: bool = True  # in linear layers and layer norms
    shortcut: bool = True  # the residual connections around both sublayers
    tie_word_embeddings: bool = True  # the output projection is the token embedding
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # divide attention scores by sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the block's number, from 1
    embd_pdrop: float = 0.0  # dropout after the embeddings,
    attn_pdrop: float = 0.0  # on the attention weights,
    resid_pdrop: float = 0.0  # and on each sublayer's output
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_inner"):
            value = getattr(self, name)
            if value is None and name == "n_inner":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                allowed = "a whole number, 1 or more, below 2**31"
                raise InputError(f"{name} is {show(value)}: it must be {allowed}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"{name} is {show(value)}: it must be true or false")
        for name in _DROPOUTS:
            self._check_number(name, 0.0, 1.0)
        self._check_number("layer_norm_epsilon", 0.0, 1.0)
        self._check_number("initializer_range", 0.0, 1e6)
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                "every head needs the same whole share of the width"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise InputError(f"n_embd is {self.n_embd}: sinusoidal positions need an even width")

    def _check_number(self, name: str, low: float, below: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name} is {show(value)}: it must be a number")
        if not low <= value < below:
            raise InputError(f"{name} is {show(value)}: it must be in [{low:g}, {below:g})")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward's inner layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def parameter_count(self) -> int:
        """How many numbers the weights are, a tied projection counted once."""
        C, bias = self.n_embd, int(self.bias)
        norm = C + bias * C
        attention = 4 * (C * C + bias * C)
        feed_forward = 2 * C * self.inner_dim + bias * (self.inner_dim + C)
        count = self.vocab_size * C * (1 if self.tie_word_embeddings else 2)
        count += self.block_size * C * (self.position == "learned")
        count += norm * (self.norm == "pre")
        return count + self.n_layer * (attention + feed_forward + 2 * norm)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The configuration of that name, with some fields changed.

        Args:
            name: one of `PRESETS`.
            overrides: fields of GPTConfig that replace the preset's.
        Raises:
            InputError: for an unknown name or field, or a value that cannot work.
        """
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        names = [field.name for field in fields(cls)]
        for field in overrides:
            if field not in names:
                raise unknown("field of GPTConfig", field, names)
        return cls(**{**PRESETS[name], **overrides})


# The four published sizes of GPT-2 (Radford et al. 2019, table 2), and two for a laptop, which
# fit the built-in byte tokenizer.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 257},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 257},
}
