"""How well a model predicts: its loss on a text or prepared tokens, or a published test."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.commands.texts import TEXTS, add_text_flags, prepared_or_none, text_settings
from tinygpt.data.dataset import SPLITS, Dataset
from tinygpt.data.prepare import prepare
from tinygpt.errors import InputError
from tinygpt.evaluation.losses import Scorer, evaluate_data
from tinygpt.evaluation.tasks import hellaswag, lambada
from tinygpt.options import Kind
from tinygpt.tokenizer.tokenizer import Tokenizer

_TASKS = {"hellaswag": hellaswag, "lambada": lambada}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt evaluate`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a name to fetch, such as gpt2")
    words = (
        f"a folder of prepared tokens; {' or '.join(_TASKS)} and the file of its JSON lines; or "
    )
    add("data", nargs="+", metavar="DATA", help=words + TEXTS)
    kind = Kind(str, choices=SPLITS)
    add_flag(parser, "--split", kind=kind, help="of prepared tokens (default: val)")
    words = "move the window by N tokens (default: half of it)"
    add_flag(parser, "--stride", kind=int, help=words, low=1)
    add_shared(parser, "--tokenizer")
    add_text_flags(parser, leave_out=["val"])
    add_shared(parser, "--json")
    add_shared(parser, "--plain")


def run(args: argparse.Namespace) -> int:
    """`tinygpt evaluate`: print the numbers, one a line."""
    task = _TASKS.get(args.data[0])
    if task and len(args.data) != 2:
        name = args.data[0]
        raise InputError(f"{name} is measured on a file: tinygpt evaluate MODEL {name} FILE")
    found = open_checkpoint(args.model)
    tokenizer = found.tokenizer(args.tokenizer)
    with ExitStack() as stack:
        if task:
            result = task(Scorer(found.load()), tokenizer, Path(args.data[1]))
        else:
            window = found.config.block_size
            if args.stride is not None and args.stride > window:
                raise InputError(
                    f"--stride is {args.stride}: it must be from 1 to the window, {window}"
                )
            data, split, source = _data(args, tokenizer, stack)
            data.check(found.config.vocab_size, tokenizer)  # before the model's seconds
            result = evaluate_data(
                found.load(), data, split, args.stride, tokenizer=tokenizer, source=source
            )
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name.replace('_', ' '):>20}  {shown}", file=sys.stdout)
    return 0


def _data(
    args: argparse.Namespace, tokenizer: Tokenizer, stack: ExitStack
) -> tuple[Dataset, str, str | None]:
    """What to measure on: prepared tokens, or all of a text in the model's.

    Returns:
        the tokens, the split, and what an error calls a text.
    """
    if folder := prepared_or_none(args):
        return Dataset.open(folder), args.split or "val", None
    if args.split:
        raise InputError("--split is for prepared tokens: a text is measured as a whole")
    folder = Path(stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True)), "data")
    prepare(args.data, folder, tokenizer, val=0, **text_settings(args))
    return Dataset.open(folder), "train", " ".join(args.data)
