"""Turn a text into token files, to train on and to evaluate with."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.data.dataset import SPLITS
from tinygpt.data.prepare import prepare
from tinygpt.errors import say


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `tinygpt prepare` takes."""
    words = "UTF-8 text, or shakespeare to fetch char-rnn's file"
    parser.add_argument("source", metavar="FILE|FOLDER", help=words)
    kinds = "char, bytes, gpt2, bpe:N to learn N ids from the text, or a folder or model that has "
    kinds += "one (default: char)"
    add_shared(parser, "--tokenizer", default="char", help=kinds)
    words = "the share for validation (default: 0.1)"
    add_flag(parser, "--val", kind=float, default=0.1, help=words, low=0, below=1)
    words = "the source is JSONL, with the text under this key"
    add_flag(parser, "--field", metavar="KEY", help=words)
    words = "the folder to make (default: named after the source)"
    add_flag(parser, "-o", "--out", metavar="DIR", help=words)


def run(args: argparse.Namespace) -> int:
    """`tinygpt prepare`: make the folder and say what is in it."""
    kind = Path(args.tokenizer).name.replace(":", "")
    name = f"{Path(args.source).resolve().stem}-{kind}"
    out = Path(args.out or name)
    header = prepare(args.source, out, args.tokenizer, args.val, args.field)
    counts = " and ".join(f"{header.splits[split].tokens:,} {split}" for split in SPLITS)
    say(f"{out}: {counts} tokens of {header.vocab_size:,} ids")
    return 0
