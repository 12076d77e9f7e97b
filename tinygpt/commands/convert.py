"""Turn a checkpoint of any form into one of Hugging Face's form, or into a GGUF file.

The result is written whole or not at all, and never replaces what is already there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tinygpt.checkpoints.config_json import beyond_gpt2
from tinygpt.checkpoints.open_checkpoint import Checkpoint, open_checkpoint
from tinygpt.checkpoints.quantization import DTYPES, check_dtype, dtype_of
from tinygpt.checkpoints.save_gguf import check_gguf, save_gguf
from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.errors import CheckpointError, InputError, one_line, say
from tinygpt.options import Kind
from tinygpt.runtime import device
from tinygpt.storage import atomic_folder
from tinygpt.tokenizer.tokenizer import Tokenizer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt convert`."""
    add = parser.add_argument
    add("source", metavar="IN", help="a model's folder or file, or a name to fetch, such as gpt2")
    add("out", metavar="OUT", help="the folder (hf) or file (gguf) to make")
    kind = Kind(str, choices=("hf", "gguf"))
    add_flag(parser, "--to", kind=kind, required=True, help="the form of what comes out")
    names = ", ".join(DTYPES)
    add_shared(parser, "--dtype", help=f"of the weights: {names}, in GGUF Q8_0 (default: as held)")
    add_shared(parser, "--tokenizer")


def run(args: argparse.Namespace) -> int:
    """`tinygpt convert`: print the path of what it made."""
    device.check()
    if args.dtype:
        check_dtype(args.dtype)
    out = Path(args.out)
    if os.path.lexists(out):
        raise InputError(f"{out} is there already: name another, or remove it first")
    found = open_checkpoint(args.source)
    tokenizer = _tokenizer(found, args.tokenizer)
    save = {"hf": to_hf, "gguf": to_gguf}[args.to]
    save(found, out, tokenizer, args.dtype)
    print(one_line(str(out)))
    return 0


def _tokenizer(found: Checkpoint, given: str | None) -> Tokenizer | None:
    """The model's tokenizer; None, and a word about it, where it brings none."""
    try:
        return found.tokenizer(given)
    except InputError as error:
        if given or isinstance(error, CheckpointError):
            raise
        say(f"without a tokenizer: {error}")
        return None


def to_hf(found: Checkpoint, out: Path, tokenizer: Tokenizer | None, dtype: str | None) -> None:
    """A folder that `transformers` loads as a model and a tokenizer.

    Raises:
        InputError: for a model that GPT-2's form cannot say, or what cannot be written.
    """
    for name, value in beyond_gpt2(found.config).items():
        raise InputError(f"{name} is {value!r}, which Hugging Face's gpt2 cannot say")
    model = found.load(dtype)
    if (held := dtype_of(model.wte)) == "int8":
        fact = f"dtype is {held!r}, which Hugging Face's gpt2 cannot say"
        raise InputError(f"{fact}: give another --dtype")
    with atomic_folder(out) as folder:
        model.save_pretrained(folder, tokenizer)
        if tokenizer and tokenizer.name == "char":
            say("transformers has no tokenizer of characters: it will load the model alone")


def to_gguf(found: Checkpoint, out: Path, tokenizer: Tokenizer | None, dtype: str | None) -> None:
    """A file with which llama.cpp continues a prompt as the model does: see `save_gguf`.

    Raises:
        InputError: for a model or tokenizer that GGUF's form cannot say, or what cannot be written.
    """
    check_gguf(found.config, dtype)
    # Q8_0 is made from the stored weights; from int8 ones it would round a second time.
    model = found.load("float32" if dtype == "int8" else dtype)
    save_gguf(model, out, tokenizer, dtype)
