"""What the commands that read texts have in common: the flags, and what DATA stands for."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tinygpt.commands.flags import add_options, given, spelled
from tinygpt.data.corpus import TextSettings
from tinygpt.data.dataset import Header, tokens_folder
from tinygpt.data.prepare import prepare
from tinygpt.errors import InputError
from tinygpt.options import defaults

TEXTS = "UTF-8 text: files, folders, patterns such as 'texts/*.txt', or shakespeare to fetch one"
KINDS = "char, bytes, gpt2, bpe:N to learn N ids from the text, or a folder or model that has one"


def add_text_flags(parser: Any, leave_out: Collection[str] = ()) -> None:
    """Add the flags that say how texts are read."""
    add_options(parser, TextSettings, [x for x in defaults(TextSettings) if x not in leave_out])


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the flags that were given."""
    return given(args, [name for name in defaults(TextSettings) if hasattr(args, name)])


def prepared_or_none(args: argparse.Namespace, *, refused: Collection[str] = ()) -> Path | None:
    """The folder of prepared tokens that DATA stands for, None where it stands for texts.

    Args:
        refused: what else, besides how texts are read, does not go with prepared tokens.
    Raises:
        InputError: when it does, and a flag is for texts.
    """
    folder = tokens_folder(args.data[0]) if len(args.data) == 1 else None
    if folder:
        for name in [*given(args, refused), *text_settings(args)]:
            flag = spelled(args)(name)
            raise InputError(f"{flag} is for a text, but {folder} holds prepared tokens")
    return folder


def prepared(args: argparse.Namespace, tokens: Path, usual: dict[str, Any]) -> Path:
    """The folder of tokens that `train` reads: DATA, or one made of its texts.

    Args:
        tokens: where to make it, in the folder of the run.
        usual: the tokenizer, and how texts are read, where no flag says otherwise.
    """
    if folder := prepared_or_none(args, refused=["tokenizer"]):
        return folder
    settings = usual | text_settings(args) | given(args, ["tokenizer"])
    if args.resume and (tokens / "header.json").is_file():  # as they were read at first
        header = Header.read(tokens)
        settings = {name: getattr(header, name) for name in defaults(TextSettings)} | settings
    prepare(args.data, tokens, **settings, leave_out=tokens.parent)
    return tokens
