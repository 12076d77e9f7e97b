"""Curves of training runs, from their logs; drawn by matplotlib, an optional extra."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.commands.flags import add_flag
from tinygpt.errors import CheckpointError, InputError, reason, say
from tinygpt.storage import atomic_file, read_text
from tinygpt.tokenizer.encoding import same_tokenizer
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.training import run_files


def read_log(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers in a run's `log.jsonl`: name -> (step, value) pairs.

    Raises:
        CheckpointError: when it cannot be read, or holds no numbers.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in read_text(run / run_files.LOG).split("\n"):  # a sample may hold U+2028 and the like
        if not (entry := run_files.log_entry(line)):  # a killed run may leave half a line
            continue
        step = entry.pop("step")
        for name, value in entry.items():
            # What is larger was no loss, nor can it be drawn.
            if type(value) in (int, float) and abs(value) < 1e30:
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise CheckpointError(f"{run / run_files.LOG}: it holds no steps of training")
    return curves


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt plot`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that `train` made")
    words = "the image, by its ending .png, .svg or .pdf (default: curves.png)"
    add_flag(parser, "-o", "--out", metavar="FILE", default="curves.png", help=words)


def run(args: argparse.Namespace) -> int:
    """`tinygpt plot`: losses, validation losses and learning rates of some runs in one image."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plot needs matplotlib: pip install 'tinygpt[plot]'") from error
    logs = {path: read_log(Path(path)) for path in args.runs}
    compare_tokenizers(args.runs)
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (path, curves) in enumerate(logs.items()):
        color = f"C{number % 10}"
        _draw(losses, curves.get("loss"), color=color, alpha=0.3)
        _draw(losses, curves.get("val_loss"), color=color, marker="o")
        # A dollar begins a formula, and what begins with an underscore stands in no legend.
        label = f"./{path}" if path.startswith("_") else path
        losses.plot([], [], color=color, marker="o", label=label.replace("$", r"\$"))
        _draw(rates, curves.get("learning_rate"), color=color)
    losses.set_ylabel("loss, nats a token (points: validation)")
    rates.set(ylabel="learning rate", xlabel="step")
    losses.legend()
    out = Path(args.out)
    try:
        with atomic_file(out if out.suffix else f"{out}.png") as file:
            figure.savefig(file, format=out.suffix[1:] or "png")
    except ValueError as error:  # for an ending that it does not know
        raise InputError(f"cannot write {out}: {reason(error)}") from error
    return 0


def compare_tokenizers(runs: list[str]) -> None:
    """Say where losses, which are those of a token, are of tokens that are not the same."""
    known: list[tuple[str, Tokenizer]] = []
    for run in runs:
        with suppress(InputError):  # a run that has saved nothing yet has none
            known.append((run, load_tokenizer(Path(run))))
    for run, tokenizer in known[1:]:
        if not same_tokenizer(known[0][1], tokenizer):
            say(
                f"{known[0][0]} and {run} have other tokens, so their losses do not compare: "
                "`tinygpt evaluate` gives bits per byte, which do"
            )


def _draw(axes: Any, points: list[tuple[int, float]] | None, **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **style)
