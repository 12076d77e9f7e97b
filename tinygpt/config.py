"""What a GPT is made of, as plain numbers: the configuration, checked when it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tinygpt.errors import InputError, unknown
from tinygpt.options import Checked, check_names, option

_SIZE = {"low": 1, "below": 2**31}
_SHARE = {"low": 0.0, "below": 1.0}


# What an option may be, each list once.
Norm = Literal["pre", "post", "deep"]
Position = Literal["learned", "sinusoidal"]
Activation = Literal["gelu_tanh", "gelu", "relu"]


@dataclass(frozen=True)
class GPTConfig(Checked):
    """The shape of a GPT. Frozen; a value that cannot work raises InputError, naming it.

    The defaults are GPT-2 124M. Names follow GPT-2's published `config.json` where it has one.
    """

    n_layer: int = option(12, "transformer blocks", short=("--layers",), limits=_SIZE)
    n_head: int = option(
        12, "attention heads in each; they divide the width", short=("--heads",), limits=_SIZE
    )
    n_embd: int = option(768, "width of the model", short=("--dim",), limits=_SIZE)
    block_size: int = option(
        1024,
        "the window: how many tokens the model sees at once",
        short=("--context",),
        limits=_SIZE,
    )
    vocab_size: int = option(
        50257, "how many token ids there are", short=("--vocab",), limits=_SIZE
    )
    n_inner: int | None = option(
        None,
        "width of the feed-forward's inner layer; by default 4 * n_embd",
        short=("--inner",),
        limits=_SIZE,
    )
    norm: Norm = option(
        "pre", "layer norms before or after each sublayer; deep: after, the shortcut made larger"
    )
    position: Position = option("learned", "positional encodings")
    activation: Activation = option("gelu_tanh", "in the feed-forward")
    bias: bool = option(True, "whether linear layers and layer norms have bias terms")
    shortcut: bool = option(True, "whether both sublayers have residual connections")
    tie_word_embeddings: bool = option(
        True, "whether the output projection is the token embedding", off=("--untied",)
    )
    layer_norm_epsilon: float = option(
        1e-5, "what layer norms add to the variance", flag=False, limits=_SHARE
    )
    scale_attn_weights: bool = option(
        True, "attention scores are divided by sqrt(head_dim)", flag=False
    )
    scale_attn_by_inverse_layer_idx: bool = option(
        False, "and by the block's number, from 1", flag=False
    )
    embd_pdrop: float = option(0.0, "dropout after the embeddings", flag=False, limits=_SHARE)
    attn_pdrop: float = option(0.0, "dropout on the attention weights", flag=False, limits=_SHARE)
    resid_pdrop: float = option(0.0, "dropout on each sublayer's output", flag=False, limits=_SHARE)
    initializer_range: float = option(
        0.02,
        "standard deviation of a new model's weights",
        flag=False,
        limits={"low": 0.0, "below": 1e6},
    )

    @classmethod
    def check(cls, values: Mapping[str, Any], spelled: Callable[[str], str] = str) -> None:
        """Refuse values of which no model can be made: see `options.check_options`."""
        super().check(values, spelled)
        width, heads = values["n_embd"], values["n_head"]
        if width % heads:
            raise InputError(
                f"{spelled('n_embd')} {width} is not divisible by {spelled('n_head')} {heads}: "
                "every head needs the same whole share of the width"
            )
        if values["position"] == "sinusoidal" and width % 2:
            raise InputError(
                f"{spelled('n_embd')} is {width}: sinusoidal positions need an even width"
            )

    def __repr__(self) -> str:
        """What it takes to make it again: its sizes, and what is not GPT-2's."""
        sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        told = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in fields(self)
            if each.name in sizes or getattr(self, each.name) != each.default
        ]
        return f"GPTConfig({', '.join(told)})"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward's inner layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def shortcut_scale(self) -> float:
        """What the residual is multiplied with before a sublayer's output is added.

        Source: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", table 1.
        """
        return (2 * self.n_layer) ** 0.25 if self.norm == "deep" else 1.0

    @property
    def parameter_count(self) -> int:
        """How many numbers the weights are, a tied projection counted once."""
        C, bias = self.n_embd, int(self.bias)
        norm = C + bias * C
        attention = 4 * (C * C + bias * C)
        feed_forward = 2 * C * self.inner_dim + bias * (self.inner_dim + C)
        count = self.vocab_size * C * (1 if self.tie_word_embeddings else 2)
        if self.position == "learned":
            count += self.block_size * C
        if self.norm == "pre":  # the one after the last block, which post-norm does not need
            count += norm
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
        check_names(cls, overrides, "field of GPTConfig")
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

# The fields that are flags of every command which makes a new model.
SHAPE = tuple(field.name for field in fields(GPTConfig) if field.metadata["flag"])
