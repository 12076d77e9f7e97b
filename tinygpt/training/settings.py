"""How a model is trained, as plain numbers: the settings, their files, the recipes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinygpt.config import SHAPE as MODEL_SHAPE
from tinygpt.config import Activation, GPTConfig, Norm, Position
from tinygpt.errors import CheckpointError, reason, unknown
from tinygpt.options import Checked, check_names, defaults, option, option_of
from tinygpt.storage import read_text

# What describes a new model; how many token ids it has, the data says.
SHAPE = tuple(name for name in MODEL_SHAPE if name != "vocab_size")
MOST = 2**31 - 1  # that a count may be, of steps as of samples


def _shape(name: str, default: Any, help: str | None = None) -> Any:
    return option_of(GPTConfig, name, default, help)


def _count(default: int, help: str, low: int = 0) -> Any:
    return option(default, help, limits={"low": low, "below": MOST + 1})


def _amount(default: float, help: str, **limits: float) -> Any:
    return option(default, help, limits={"low": 0, **limits})


@dataclass(frozen=True)
class TrainConfig(Checked):
    """All settings of a training run. Frozen; a value that cannot work raises InputError.

    Each field is a flag of `tinygpt train` (`--batch-size` for batch_size) and a key of its TOML
    file; those of a new model's shape are declared in GPTConfig. The defaults are for a text of a
    megabyte or so on a laptop: nanoGPT's small model, at twice the rate and for twice as long.
    """

    n_layer: int = _shape("n_layer", 4)
    n_head: int = _shape("n_head", 4)
    n_embd: int = _shape("n_embd", 128)
    block_size: int = _shape("block_size", 64, "the window, and the tokens in each sample")
    n_inner: int | None = _shape("n_inner", None)
    norm: Norm = _shape("norm", "pre")
    position: Position = _shape("position", "learned")
    activation: Activation = _shape("activation", "gelu_tanh")
    bias: bool = _shape("bias", False)
    shortcut: bool = _shape("shortcut", True)
    tie_word_embeddings: bool = _shape("tie_word_embeddings", True)
    init: Literal["gpt2", "xavier"] = option("gpt2", "how the weights of a new model are drawn")
    dropout: float = _amount(0.0, "share of activations dropped while training", below=1)
    order: Literal["random", "epoch"] = option(
        "random", "random windows, or epoch: each window once, then anew"
    )
    batch_size: int = _count(12, "samples that are computed at once", low=1)
    accumulate: int = _count(1, "batches whose gradients make one step", low=1)
    steps: int = _count(
        4000,
        "updates of the weights in all, over which the rate falls; --resume can raise it",
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "adamw, or muon for the matrices in the blocks"
    )
    learning_rate: float = _amount(2e-3, "the highest, for AdamW")
    min_learning_rate: float = _amount(2e-4, "the last")
    muon_learning_rate: float = _amount(0.02, "the highest, for Muon")
    warmup_steps: int = _count(100, "steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "cosine, linear or constant: how the learning rate falls"
    )
    beta1: float = _amount(0.9, "AdamW's memory of gradients", below=1)
    beta2: float = _amount(0.99, "AdamW's memory of their squares", below=1)
    weight_decay: float = _amount(0.1, "pull of matrices towards zero")
    grad_clip: float = _amount(1.0, "longest gradient over all weights; 0 does not clip")
    compute: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "float32, bfloat16 or float16, in the forward pass"
    )
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = option(
        "float32", "how checkpoints hold the weights; training itself keeps them in float32"
    )
    lora_rank: int = _count(0, "train only low-rank additions to the matrices; 0 trains all")
    lora_alpha: float = _amount(16.0, "those are scaled by this / rank")
    eval_every: int = _count(250, "steps between evaluations, at each of which is saved", low=1)
    eval_batches: int = _count(50, "most batches of an evaluation, spread over the split", low=1)
    sample_tokens: int = _count(100, "length of the sample at each evaluation; 0 makes none")
    sample_temperature: float = _amount(0.8, "how daring that sample is; 0 takes the likeliest")
    keep: int = _count(2, "newest checkpoints to keep, besides the best", low=1)
    keep_every: int = _count(0, "save and keep each step that this divides, too; 0 keeps no more")
    seed: int = option(
        1337, "of the initial weights, the batches and dropout", limits={"low": 0, "below": 2**32}
    )

    @classmethod
    def check(cls, values: Mapping[str, Any], spelled: Callable[[str], str] = str) -> None:
        """Refuse settings with which nothing can be trained: see `options.check_options`."""
        super().check(values, spelled)
        shape = {name: values[name] for name in SHAPE}
        GPTConfig.check({**defaults(GPTConfig), **shape}, spelled)

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The shape of a new model for so many token ids."""
        changes: dict[str, Any] = {name: getattr(self, name) for name in SHAPE}
        changes |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        return GPTConfig(vocab_size=vocab_size, **changes)

    @classmethod
    def of(cls, *layers: Mapping[str, Any], spelled: Callable[[str], str] = str) -> TrainConfig:
        """The defaults, changed by each of some mappings in turn.

        Args:
            spelled: a field's name -> what the user calls it, for an error.
        Raises:
            InputError: for an unknown setting, or a value that cannot work.
        """
        merged = {name: value for layer in layers for name, value in layer.items()}
        check_names(cls, merged, "setting")
        cls.check({**defaults(cls), **merged}, spelled)
        return cls(**merged)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        CheckpointError: when it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise CheckpointError(f"{path}: it is not TOML: {reason(error)}") from error


def fine_tuning(block_size: int, lora: bool) -> dict[str, Any]:
    """What is different, where no setting says otherwise, for a model that has learnt already.

    In 100 steps on tales, the built-in model's loss on them fell from 2.22 to 1.62, 1.52, 1.49 and
    1.59 at rates of 3e-5, 1e-4, 3e-4 and 1e-3; on plays, which it knew, it rose from 1.486 to
    1.488, 1.501, 1.532 and 1.695. LoRA's matrices are new: at 1e-3 the tales came to 1.54.

    Args:
        block_size: the model's window. A long one is cut, for memory's and time's sake.
    """
    return {
        "learning_rate": 1e-3 if lora else 1e-4,
        "min_learning_rate": 1e-4 if lora else 1e-5,
        "steps": 500,
        "warmup_steps": 20,
        "eval_every": 100,
        "batch_size": 4,
        "block_size": min(256, block_size),
    }


# What --minutes can be: a year is longer than anybody waits, and fits into any clock.
MINUTES = {"above": 0, "most": 366 * 24 * 60}

RECIPES: dict[str, dict[str, Any]] = {
    # The storyteller in the package; benchmarks/LOG.md says how this was chosen.
    "tales": {
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 288,
        "block_size": 512,
        "order": "epoch",
        "batch_size": 8,
        "steps": 4000,
        "optimizer": "muon",
        "min_learning_rate": 0.0,
        "schedule": "linear",
        "eval_batches": 9,
        "sample_tokens": 200,
    },
    # The others are nanoGPT's: its README's for characters on a CPU,
    # config/train_shakespeare_char.py, and config/train_gpt2.py, whose eight GPUs' batches are
    # accumulated here on one.
    # At nanoGPT's own rate, half of this, the loss on the last tenth comes to 1.91, not to 1.80.
    "shakespeare-cpu": {
        "steps": 2000,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-4,
        "eval_batches": 200,
    },
    "shakespeare-gpu": {
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "eval_batches": 200,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "block_size": 256,
        "batch_size": 64,
        "steps": 5000,
        "dropout": 0.2,
    },
    "gpt2-124m": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "batch_size": 12,
        "accumulate": 40,
        "steps": 600_000,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "warmup_steps": 2000,
        "beta2": 0.95,
        "compute": "bfloat16",
        "eval_every": 1000,
        "eval_batches": 200,
    },
}
# How the recipes' texts are read: by which tokenizer, and with which of `TextSettings`.
_TEXTS: dict[str, dict[str, Any]] = {
    "tales": {"tokenizer": "bpe:8192", "val": 0.01},
    "shakespeare-cpu": {"tokenizer": "char"},
    "shakespeare-gpu": {"tokenizer": "char"},
    "gpt2-124m": {"tokenizer": "gpt2"},
}
_SHORT_TEXT_BYTES = 200_000


def usual_text(recipe: str | None, text_bytes: float) -> dict[str, Any]:
    """How a text is read of which nothing is said: as a recipe has it, or as suits its length.

    A thousand frequent pieces of words make words much sooner than characters do, but of a short
    text they leave too few tokens to learn from.

    Returns:
        the tokenizer, and what the recipe changes of `TextSettings`.
    """
    short = text_bytes < _SHORT_TEXT_BYTES
    return {"tokenizer": "char" if short else "bpe:1024"} | _TEXTS.get(recipe or "", {})


def settings_of(recipe: str | None) -> dict[str, Any]:
    """What a recipe changes of the defaults.

    Raises:
        InputError: for an unknown name.
    """
    if recipe is not None and recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe] if recipe else {}
