"""Turn a text into token files, to train on and to evaluate with."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinygpt.data.dataset import SPLITS
from tinygpt.data.prepare import prepare
from tinygpt.errors import say


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `tinygpt prepare` takes."""
    add = parser.add_argument
    add("source", metavar="FILE|FOLDER", help="UTF-8 text, or shakespeare to fetch char-rnn's file")
    kinds = "char, bytes, gpt2, or bpe:N to learn N ids from the text (default: char)"
    add("--tokenizer", metavar="T", default="char", help=kinds)
    add("--val", metavar="X", type=float, default=0.1, help="for validation (default: 0.1)")
    add("--field", metavar="KEY", help="the source is JSONL, with the text under this key")
    add("-o", "--out", metavar="DIR", help="the folder to make (default: named after the source)")


def run(args: argparse.Namespace) -> int:
    """`tinygpt prepare`: make the folder and say what is in it."""
    name = f"{Path(args.source).resolve().stem}-{args.tokenizer.replace(':', '')}"
    out = Path(args.out or name)
    header = prepare(args.source, out, args.tokenizer, args.val, args.field)
    counts = " and ".join(f"{header.splits[split].tokens:,} {split}" for split in SPLITS)
    say(f"{out}: {counts} tokens of {header.vocab_size:,} ids")
    return 0
