"""One page about a training run: settings, curves, samples, and a look inside what came of it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.run_folder import checkpoint_in, steps
from tinygpt.commands.plot import read_log
from tinygpt.commands.shown_as import add_report_flags, show_report
from tinygpt.data.dataset import Dataset
from tinygpt.errors import InputError
from tinygpt.options import defaults
from tinygpt.storage import DIGESTS, read_text
from tinygpt.study import shown
from tinygpt.study.attention import head_scores
from tinygpt.study.inside import look
from tinygpt.study.lens import lens
from tinygpt.study.report import Chart, Part, Report, Table, Text
from tinygpt.training import run_files
from tinygpt.training.settings import TrainConfig

_TOKENS = 64  # of the validation text that are looked at


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt report`."""
    parser.add_argument("run", metavar="RUN", help="a folder that `train` made")
    add_report_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`tinygpt report`: what a run was, and what came of it."""
    folder = Path(args.run)
    if (last := checkpoint_in(folder, "last")) is None:
        raise InputError(f"{folder} is no run with checkpoints: give the folder of one")
    report = about(folder, last)
    show_report(report, args)
    return 0


def about(folder: Path, last: Path) -> Report:
    """The report on a run.

    Args:
        last: its last checkpoint.
    """
    state, curves = run_files.read_state(last), read_log(folder)
    usual, config = defaults(TrainConfig), vars(state.config)
    settings = [[name, str(value), _changed(value, usual[name])] for name, value in config.items()]
    losses = {
        name: curves[key]
        for name, key in (("training", "loss"), ("validation", "val_loss"))
        if key in curves
    }
    parts: list[Part] = [
        Chart("Loss, nats a token", losses, "step"),
        Table("Settings", ("setting", "value", "default"), settings),
    ]
    if "learning_rate" in curves:
        parts.insert(1, Chart("Learning rate", {"learning rate": curves["learning_rate"]}, "step"))
    samples = _samples(folder)
    parts += [Text(f"Sample at step {step:,}", text) for step, text in samples[-3:]]
    inside, found = _inside(folder)
    parts += inside
    commands = "\n".join(
        f"tinygpt {line} {shlex.quote(str(folder))}"
        for line in ("generate --model", "train DATA --resume -o", "plot", "doctor")
    )
    digests = _digests(folder)
    parts += [
        Table("SHA-256 of the weights", ("checkpoint", "SHA-256"), digests),
        Text("Commands", commands, "DATA is what it was trained on"),
    ]
    result = {
        "config": config, "step": state.counters.step, "best": state.best, "source": state.source,
        "curves": curves, "samples": samples, "digests": dict(digests), "inside": found,
    }  # fmt: skip
    return Report(f"The run {folder}, at step {state.counters.step:,}", parts, result)


def _changed(value: Any, usual: Any) -> str:
    return "" if value == usual else str(usual)


def _samples(folder: Path) -> list[tuple[int, str]]:
    entries = map(run_files.log_entry, read_text(folder / run_files.LOG).split("\n"))
    return [(entry["step"], entry["sample"]) for entry in entries if entry and "sample" in entry]


def _inside(folder: Path) -> tuple[list[Part], dict[str, Any]]:
    """The lens and the heads of the best model, on the begin of the validation text."""
    opened = open_checkpoint(folder)
    tokenizer, model = opened.tokenizer(), opened.load("float32")
    data = folder / "data"
    if (data / "header.json").is_file() and len(tokens := Dataset.open(data).val) > 1:
        ids = [int(i) for i in tokens[: min(_TOKENS, model.config.block_size)]]
    else:
        ids = [tokenizer.start or 0] * 2
    inside = look(model, ids)
    decided, scores = lens(model, inside), head_scores(model)
    parts = shown.lens_report(decided, inside, tokenizer, len(ids) - 1).parts
    parts = [*parts, *shown.attention_report(inside, scores, None, None).parts]
    return parts, {"ids": ids, "lens": decided, "heads": scores}


def _digests(folder: Path) -> list[list[str]]:
    """Of each checkpoint what SHA256SUMS says of its weights; older runs have none."""
    found = []
    for step in reversed(steps(folder)):
        if (step / DIGESTS).is_file():
            for line in read_text(step / DIGESTS).splitlines():
                digest, _, name = line.partition("  ")
                if name == "model.safetensors":
                    found.append([step.name, digest])
    return found
