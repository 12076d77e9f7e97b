"""The command that trains: from scratch, from where a run stopped, or from any loadable model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinygrad.nn.state import get_state_dict

from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.commands.flags import add_flag, add_options, add_shared, given, spelled
from tinygpt.data.dataset import Dataset
from tinygpt.data.prepare import prepare
from tinygpt.errors import InputError, reason, say
from tinygpt.model import GPT
from tinygpt.options import defaults
from tinygpt.runtime import device
from tinygpt.training.run import Run
from tinygpt.training.settings import RECIPES, SHAPE, TrainConfig, read_settings, settings_of


def start(
    folder: Path,
    data: Dataset,
    settings: dict[str, Any],
    model: str | None = None,
    minutes: float | None = None,
    spelled: Callable[[str], str] = str,
) -> Run:
    """A new run: from scratch, or from any model that can be loaded.

    Args:
        settings: fields of TrainConfig that differ from the defaults.
        model: name or folder of the model to begin with; None makes a new one.
        spelled: a setting's name -> what the user calls it, for an error.
    Raises:
        InputError: when the settings, the model, the data and the folder do not go together.
    """
    if (folder / "last").exists():
        raise InputError(
            f"{folder} already holds a run: pass --resume to go on with it, or another folder"
        )
    tokenizer = data.tokenizer()
    if model is None:
        config = TrainConfig.of(settings, spelled=spelled)
        gpt = GPT(config.gpt_config(data.header.vocab_size), config.seed)
        return Run(folder, data, tokenizer, gpt, config, minutes)
    for name in SHAPE:
        if name in settings and name != "block_size":
            raise InputError(
                f"{spelled(name)} describes a new model, but --model brings its own shape"
            )
    found = open_checkpoint(model)
    data.check(found.config.vocab_size, found.tokenizer())
    gpt = found.load("float32")  # gradients need it, whatever the file holds
    shape = {name: getattr(gpt.config, name) for name in SHAPE}
    window = settings.get("block_size", min(TrainConfig.block_size, shape["block_size"]))
    config = TrainConfig.of(shape, settings, {"block_size": window}, spelled=spelled)
    if window > (most := gpt.config.block_size):
        name = spelled("block_size")
        raise InputError(f"{name} is {window}, but the window of {model} has {most}")
    return Run(folder, data, tokenizer, _with_dropout(gpt, config.dropout), config, minutes)


def _with_dropout(model: GPT, dropout: float) -> GPT:
    """The same model, its weights shared, with that dropout."""
    dropouts: dict[str, Any] = dict.fromkeys(
        ("embd_pdrop", "attn_pdrop", "resid_pdrop"), float(dropout)
    )
    copy = GPT(replace(model.config, **dropouts), seed=None)
    weights = get_state_dict(model)
    for name, weight in get_state_dict(copy).items():
        weight.replace(weights[name])
    return copy


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt train`."""
    words = "a text, `shakespeare`, or a folder of prepared tokens"
    parser.add_argument("data", metavar="DATA", help=words)
    words = "of a text: char, bytes, gpt2 or bpe:N (default: char)"
    add_shared(parser, "--tokenizer", help=words)
    add_shared(parser, "--plain")
    words = "the run's folder, made if need be"
    add_flag(parser, "-o", "--out", metavar="RUN", required=True, help=words)
    add_flag(parser, "--recipe", metavar="R", help=f"where to start: {', '.join(RECIPES)}")
    add_flag(parser, "--config", metavar="FILE", help="settings in TOML, instead of the recipe's")
    words = "fine-tune this model instead of a new one"
    add_flag(parser, "--model", metavar="NAME|PATH", help=words)
    words = "go on from RUN's last checkpoint, exactly"
    add_flag(parser, "--resume", kind=bool, help=words)
    words = "make as many steps as fit into this time"
    add_flag(parser, "--minutes", kind=float, metavar="M", help=words, above=0)
    words = (
        "by their fields' names, n_layer for --n-layer, these and those below are also the keys "
    )
    words += "of --config's file"
    group = parser.add_argument_group("the shape of a new model", words)
    add_options(group, TrainConfig, SHAPE)
    group = parser.add_argument_group("the training")
    add_options(group, TrainConfig, [name for name in defaults(TrainConfig) if name not in SHAPE])


def run(args: argparse.Namespace) -> int:
    """`tinygpt train`: 0 at the end, 128 and the signal's number after a signal."""
    folder, settings = Path(args.out), given(args, defaults(TrainConfig))
    fresh = {"recipe": args.recipe, "config": args.config, "model": args.model}
    fresh |= {"minutes": args.minutes, **settings}
    device.check()
    data = Dataset.open(_prepared(args, folder))
    if args.resume:
        for name, value in fresh.items():
            if value is not None:
                flag = spelled(args)(name)
                raise InputError(f"{flag} cannot change a run: --resume goes on with its settings")
        job = Run.resume(folder, data)
    else:
        filed = read_settings(args.config) if args.config else {}
        settings = settings_of(args.recipe) | filed | settings
        _need_writable(folder)
        names = spelled(args, elsewhere=filed)
        job = start(folder, data, settings, args.model, args.minutes, names)
    config, shape = job.config, job.trainer.model.config
    where = f"{device.describe()}, {device.describe_operations()}"
    say(f"{shape.parameter_count:,} parameters on {where}, {config.steps} steps")
    stopped = job.go()
    if stopped is None:
        if job.best is not None:  # None where no validation loss was a number
            say(f"lowest validation loss {job.best['val_loss']:.4f}, in {folder / 'best'}")
        say(f"done: {folder / 'last'}")
        return 0
    say(f"stopped at step {job.counters.step}, saved in {folder / 'last'}: --resume goes on")
    return 128 + stopped


def _prepared(args: argparse.Namespace, folder: Path) -> Path:
    """The folder of tokens: DATA, or that of a text, made inside the run's folder."""
    source = Path(args.data)
    if source.is_dir() or (not source.exists() and args.data != "shakespeare"):
        if args.tokenizer:
            raise InputError(f"--tokenizer is for a text, but {source} is not a file")
        return source
    prepare(
        args.data if args.data == "shakespeare" else source,
        folder / "data",
        args.tokenizer or "char",
    )
    return folder / "data"


def _need_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable.tmp"
        probe.mkdir(exist_ok=True)
        os.rmdir(probe)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {reason(error)}; pass another --out") from error
