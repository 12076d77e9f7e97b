"""How a model is trained, as plain numbers: the settings, their flags and files, the recipes."""

from __future__ import annotations

import argparse
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tinygpt.config import GPTConfig
from tinygpt.errors import CheckpointError, InputError, show, unknown
from tinygpt.storage import read_text

_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "order": ("random", "epoch"),
    "compute": ("float32", "bfloat16", "float16"),
}
# Settings that describe a new model, by their names in GPTConfig.
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "norm", "position", "activation", "bias")
# The least that a number may be, where that is not 0; and what it must stay below.
_LEAST = {"batch_size": 1, "accumulate": 1, "eval_every": 1, "eval_batches": 1, "keep": 1}
_BELOW = {"beta1": 1.0, "beta2": 1.0, "dropout": 1.0, "seed": 2**32}


def _setting(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run. Frozen; a value that cannot work raises InputError.

    Each field is a flag of `tinygpt train` (`--batch-size` for batch_size) and a key of its TOML
    file. The defaults are nanoGPT's for a small model of characters on a CPU.
    """

    n_layer: int = _setting(4, "transformer blocks of a new model")
    n_head: int = _setting(4, "attention heads in each; they divide the width")
    n_embd: int = _setting(128, "width of a new model")
    block_size: int = _setting(64, "tokens in each sample, and the window of a new model")
    norm: str = _setting("pre", "pre or post: layer norms before or after each sublayer")
    position: str = _setting("learned", "learned or sinusoidal positional encodings")
    activation: str = _setting("gelu_tanh", "gelu_tanh, gelu or relu")
    bias: bool = _setting(False, "bias terms in linear layers and layer norms")
    dropout: float = _setting(0.0, "share of activations dropped while training")
    order: str = _setting("random", "random windows, or epoch: each window once, then anew")
    batch_size: int = _setting(12, "samples that are computed at once")
    accumulate: int = _setting(1, "batches whose gradients make one step")
    steps: int = _setting(2000, "updates of the weights in all")
    optimizer: str = _setting("adamw", "adamw, or muon for the matrices in the blocks")
    learning_rate: float = _setting(1e-3, "the highest, for AdamW")
    min_learning_rate: float = _setting(1e-4, "the last")
    muon_learning_rate: float = _setting(0.02, "the highest, for Muon")
    warmup_steps: int = _setting(100, "steps in which the learning rate rises")
    schedule: str = _setting("cosine", "cosine, linear or constant: how the learning rate falls")
    beta1: float = _setting(0.9, "AdamW's memory of gradients")
    beta2: float = _setting(0.99, "AdamW's memory of their squares")
    weight_decay: float = _setting(0.1, "pull of matrices towards zero")
    grad_clip: float = _setting(1.0, "longest gradient over all weights; 0 does not clip")
    compute: str = _setting("float32", "float32, bfloat16 or float16, in the forward pass")
    lora_rank: int = _setting(0, "train only low-rank additions to the matrices; 0 trains all")
    lora_alpha: float = _setting(16.0, "those are scaled by this / rank")
    eval_every: int = _setting(250, "steps between evaluations, at each of which is saved")
    eval_batches: int = _setting(200, "most batches of an evaluation, spread over the split")
    sample_tokens: int = _setting(100, "length of the sample at each evaluation; 0 makes none")
    keep: int = _setting(2, "newest checkpoints to keep, besides the best")
    seed: int = _setting(1337, "of the initial weights, the batches and dropout")

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if name in _CHOICES and value not in _CHOICES[name]:
                raise unknown(name, value, _CHOICES[name])
            if setting.type in ("int", "float") and name not in SHAPE:
                self._check_number(name, value, setting.type == "int")
        self.gpt_config(1)

    @staticmethod
    def _check_number(name: str, value: object, whole: bool) -> None:
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise InputError(f"{name} is {show(value)}: it must be a {'whole ' * whole}number")
        low, below = _LEAST.get(name, 0), _BELOW.get(name, math.inf)
        if not low <= value < below:
            limit = f"and below {below:g}" if below < math.inf else "and finite"
            raise InputError(f"{name} is {show(value)}: it must be {low} or more {limit}")

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The shape of a new model for so many token ids."""
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        shape = {name: getattr(self, name) for name in SHAPE}
        return GPTConfig(vocab_size=vocab_size, **shape, **dropouts)

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> TrainConfig:
        """The defaults, changed by each of some mappings in turn.

        Raises:
            InputError: for an unknown setting, or a value that cannot work.
        """
        merged = {name: value for layer in layers for name, value in layer.items()}
        names = [setting.name for setting in fields(cls)]
        for name in merged:
            if name not in names:
                raise unknown("setting", name, names)
        return cls(**merged)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        CheckpointError: when it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise CheckpointError(f"{path}: it is not TOML: {error}") from error


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting; one that is not given is None."""
    group = parser.add_argument_group("settings (each is also a key of --config's file)")
    for setting in fields(TrainConfig):
        flag, words = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        words = f"{words} (default: {setting.default})"
        if setting.type == "bool":
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=None, help=words)
        else:
            kind, mark = {"int": (int, "N"), "float": (float, "X"), "str": (str, "S")}[setting.type]
            group.add_argument(flag, type=kind, metavar=mark, help=words)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    given = {setting.name: getattr(args, setting.name) for setting in fields(TrainConfig)}
    return {name: value for name, value in given.items() if value is not None}


# nanoGPT's recipes: its README's for characters on a CPU, config/train_shakespeare_char.py, and
# config/train_gpt2.py, whose eight GPUs' batches are accumulated here on one.
RECIPES: dict[str, dict[str, Any]] = {
    # At nanoGPT's own rate, half of this, the loss on the last tenth comes to 1.91, not to 1.80.
    "shakespeare-cpu": {"learning_rate": 2e-3, "min_learning_rate": 2e-4},
    "shakespeare-gpu": {
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
    },
}


def settings_of(recipe: str | None) -> dict[str, Any]:
    """What a recipe changes of the defaults.

    Raises:
        InputError: for an unknown name.
    """
    if recipe is not None and recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe] if recipe else {}
