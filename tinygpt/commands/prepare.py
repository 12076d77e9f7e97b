"""Turn a text into token files, to train on and to evaluate with."""

from __future__ import annotations

import argparse
from glob import has_magic
from pathlib import Path

from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.commands.texts import KINDS, TEXTS, add_text_flags, text_settings
from tinygpt.data.dataset import SPLITS
from tinygpt.data.prepare import prepare
from tinygpt.errors import say


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `tinygpt prepare` takes."""
    parser.add_argument("source", nargs="+", metavar="TEXT", help=TEXTS)
    add_shared(parser, "--tokenizer", default="char", help=f"{KINDS} (default: char)")
    add_text_flags(parser)
    words = "the folder to make (default: named after the source)"
    add_flag(parser, "-o", "--out", metavar="DIR", help=words)


def run(args: argparse.Namespace) -> int:
    """`tinygpt prepare`: make the folder and say what is in it."""
    source = Path(args.source[0])
    while has_magic(str(source)) and not source.exists():
        source = source.parent
    kind = Path(args.tokenizer).name.replace(":", "")
    out = Path(args.out or f"{source.resolve().stem}-{kind}")
    header = prepare(args.source, out, args.tokenizer, **text_settings(args))
    counts = " and ".join(f"{header.splits[split].tokens:,} {split}" for split in SPLITS)
    say(f"{out}: {counts} tokens of {header.vocab_size:,} ids")
    return 0
