"""How well a model predicts: its loss on prepared tokens, or a published test."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.data.dataset import SPLITS, Dataset
from tinygpt.errors import InputError
from tinygpt.evaluation.losses import Scorer, evaluate_data
from tinygpt.evaluation.tasks import hellaswag, lambada
from tinygpt.options import Kind

_TASKS = ("hellaswag", "lambada")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt evaluate`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a name to fetch, such as gpt2")
    add("data", metavar="DATA", help=f"a folder of prepared tokens, or {' or '.join(_TASKS)}")
    add("file", nargs="?", metavar="FILE", help="of hellaswag or lambada: its JSON lines")
    kind = Kind(str, choices=SPLITS)
    add_flag(parser, "--split", kind=kind, default="val", help="of DATA (default: val)")
    words = "move the window by N tokens (default: all of it)"
    add_flag(parser, "--stride", kind=int, help=words, low=1)
    add_shared(parser, "--tokenizer")
    add_shared(parser, "--json")
    add_shared(parser, "--plain")


def run(args: argparse.Namespace) -> int:
    """`tinygpt evaluate`: print the numbers, one a line."""
    if (args.data in _TASKS) != (args.file is not None):
        raise InputError(f"FILE goes with {' and '.join(_TASKS)}, and with them alone")
    found = open_checkpoint(args.model)
    data = None if args.file else Dataset.open(args.data)  # before the model's seconds
    window = found.config.block_size
    if data and args.stride is not None and args.stride > window:
        raise InputError(f"--stride is {args.stride}: it must be from 1 to the window, {window}")
    tokenizer = found.tokenizer(args.tokenizer)
    if data:
        data.check(found.config.vocab_size, tokenizer)
    model = found.load()
    if data:
        result = evaluate_data(model, data, args.split, args.stride, tokenizer=tokenizer)
    else:
        task = hellaswag if args.data == "hellaswag" else lambada
        result = task(Scorer(model), tokenizer, Path(args.file))
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name.replace('_', ' '):>20}  {shown}", file=sys.stdout)
    return 0
