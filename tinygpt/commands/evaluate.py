"""How well a model predicts: its loss on prepared tokens, or a published test."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.data.dataset import Dataset
from tinygpt.errors import InputError
from tinygpt.evaluation.losses import Scorer, evaluate_data
from tinygpt.evaluation.tasks import hellaswag, lambada

_TASKS = ("hellaswag", "lambada")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt evaluate`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a name to fetch, such as gpt2")
    add("data", metavar="DATA", help=f"a folder of prepared tokens, or {' or '.join(_TASKS)}")
    add("file", nargs="?", metavar="FILE", help="of hellaswag or lambada: its JSON lines")
    add("--split", choices=("train", "val"), default="val", help="of DATA (default: val)")
    add("--stride", type=int, metavar="N", help="move the window by N tokens (default: all of it)")
    add("--tokenizer", metavar="T", help="gpt2, bytes, or a folder (default: the model's own)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`tinygpt evaluate`: print the numbers, one a line."""
    if (args.data in _TASKS) != (args.file is not None):
        raise InputError(f"FILE goes with {' and '.join(_TASKS)}, and with them alone")
    found = open_checkpoint(args.model)
    data = None if args.file else Dataset.open(args.data)  # before the model's seconds
    model = found.load()
    if data:
        result = evaluate_data(model, data, args.split, args.stride)
    else:
        tokenizer = found.tokenizer(args.tokenizer)
        task = hellaswag if args.data == "hellaswag" else lambada
        result = task(Scorer(model), tokenizer, Path(args.file))
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name.replace('_', ' '):>20}  {shown}", file=sys.stdout)
    return 0
