"""The command line: which command it is, and what its end means to the shell."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from typing import TYPE_CHECKING

from tinygpt import __version__, environment
from tinygpt.commands.interrupts import ends_in_order, status
from tinygpt.errors import InputError, give_up, message_of, say, unknown

if TYPE_CHECKING:  # tinygrad is imported once the environment is known to suit it
    from tinygpt.commands.flags import Parser

# Each is a module of this folder with `add_flags(parser)` and `run(args)`, which gives the exit
# status; and, where the processes of `mpirun` can share its work, with `shares(args)`, whether they
# do. It is imported when it is asked for, because all of them together take 0.1 s.
VERBS = {
    "generate": "continue a prompt; a prompt without a command does the same",
    "train": "train a model on a text, or go on with a run",
    "prepare": "turn a text into token files, to train on and to evaluate with",
    "evaluate": "measure how well a model predicts a text, or does at a published test",
    "study": "look inside a model: what it foresaw, where it reads, which parts decide",
    "convert": "turn a checkpoint of any form into Hugging Face's, or into a GGUF file",
    "models": "list the models that are on this machine, or remove one that was fetched",
    "plot": "draw the curves of training runs",
    "report": "make one page about a training run, with a look inside what came of it",
    "serve": "answer over HTTP, as OpenAI's clients ask, with a page to read on",
    "bench": "measure how fast this machine generates, beside other programs if you like",
    "doctor": "show what this machine has, what would help it, and whether it computes right",
    "completion": "print what makes bash, zsh or fish complete commands and flags",
}

_HELPS = {"-h", "--help", "--version"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on the arguments (by default the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started the program has closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # what their encoding lacks is spelled, not an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            if _HELPS.isdisjoint(argv):
                environment.check()
            else:
                environment.forget_faults()
            with ends_in_order(), _with_others():
                return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        return status(error)
    except (InputError, MemoryError) as error:
        message = message_of(error)
    except OSError as error:
        give_up(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return 0
        message = message_of(error)
    say(f"error: {message}")
    return 2


def _are_several() -> bool:
    """Whether `mpirun` has started more processes than this one."""
    return os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1"


def _with_others() -> AbstractContextManager[None]:
    """Where there are more processes, meet them: what goes wrong is then told once, for all."""
    if not _are_several():
        return nullcontext()
    from tinygpt.training import world

    return world.joined()


def _run(argv: Sequence[str]) -> int:
    from tinygpt.commands.flags import Parser
    from tinygpt.runtime import device

    device.keep_stdout()
    device.forgive_cache()
    device.select()
    verb, rest = "generate", argv
    if argv and argv[0] in VERBS:
        verb, rest = argv[0], argv[1:]
        about = f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}."
        parser = Parser(prog=f"tinygpt {verb}", description=about, allow_abbrev=False)
    else:
        _refuse_unknown_verb(argv)
        parser = _program()
    command = import_module(f"tinygpt.commands.{verb}")
    command.add_flags(parser)
    args, surplus = parser.parse_known_intermixed_args(rest)  # flags may stand between texts
    if rest is argv and _near_verb(args.prompt):  # it stands behind a flag, and is no prompt
        raise InputError(
            f"the command comes first: `tinygpt {_near_verb(args.prompt)} ...`; to continue that "
            f"word as a prompt: `tinygpt generate {shlex.quote(args.prompt)}`"
        )
    if surplus:
        parser.refuse(surplus[0])
    if _are_several() and not (hasattr(command, "shares") and command.shares(args)):
        raise InputError(
            f"mpirun has started several processes, and `tinygpt {verb}` is for one: start it "
            "without mpirun; `train` and `generate --prompts` share their work"
        )
    if getattr(args, "plain", None):
        os.environ["TINYGPT_KERNELS"] = "0"
    return command.run(args)


def _near_verb(prompt: str | None) -> str | None:
    """The command that a prompt of one word is, or is a slip of."""
    return next(iter(get_close_matches(prompt or "", VERBS, n=1, cutoff=0.8)), None)


def _refuse_unknown_verb(argv: Sequence[str]) -> None:
    """Refuse a first word that is written as commands are: it is more likely a slip than a prompt.

    A prompt of several words, or with punctuation, or with a capital letter where no command is
    spelled like it, is none.
    """
    if argv and (argv[0].lower() in VERBS or re.fullmatch(r"[a-z][a-z0-9_-]+", argv[0])):
        prompt = " ".join(takewhile(lambda word: not word.startswith("-"), argv))
        raise InputError(
            f"{unknown('command', argv[0], VERBS)}; to continue it as a prompt: "
            f"`tinygpt generate {shlex.quote(prompt)}`"
        )


def _program() -> Parser:
    """The parser of the program without a command, whose help shows the commands too."""
    from tinygpt.commands.flags import Parser

    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {words}" for verb, words in VERBS.items())
    parser = Parser(
        prog="tinygpt",
        usage="%(prog)s [PROMPT] [options]\n       %(prog)s COMMAND [options]",
        description="Continue a prompt with a GPT-2: the one that --model names, or else the\n"
        "built-in one, which tells tales.\n\n"
        f"commands, each with its own --help:\n{verbs}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tinygpt {__version__}")
    return parser
