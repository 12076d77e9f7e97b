"""The command line: which command it is, and what its end means to the shell."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType

from tinygpt import __version__
from tinygpt.commands import generate as sample
from tinygpt.commands.terminal import Parser
from tinygpt.errors import InputError, reason, say

# Each a module with `add_flags(parser)`, `run(args)`, which gives the exit status, and a docstring
# to show; imported when asked for, as all of them take 0.1 s.
_COMMANDS = ("bench", "convert", "doctor", "evaluate", "plot", "prepare", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on the arguments (by default the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        try:
            if not argv or argv[0] not in _COMMANDS:
                return sample.run(_sample_parser().parse_args(argv))
            command = import_module(f"tinygpt.commands.{argv[0]}")
            return command.run(_command_parser(argv[0], command).parse_args(argv[1:]))
        finally:
            sys.stdout.flush()
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        message = "out of memory: choose a smaller model or fewer samples"
    except OSError as error:
        with suppress(OSError):  # what stdout still holds, Python would try to write at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return 0
        message = f"{error.filename or 'cannot write'}: {reason(error)}"
    say(f"error: {message}")
    return 2


def _sample_parser() -> Parser:
    parser = Parser(
        prog="tinygpt",
        usage="\n       ".join(
            ["%(prog)s [PROMPT] [options]", *(f"%(prog)s {name} [options]" for name in _COMMANDS)]
        ),
        description="Continue a prompt with a GPT-2: --model, or a new one of random weights.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tinygpt {__version__}")
    sample.add_flags(parser)
    return parser


def _command_parser(name: str, command: ModuleType) -> Parser:
    about = (command.__doc__ or "").splitlines()[0]
    parser = Parser(prog=f"tinygpt {name}", description=about, allow_abbrev=False)
    command.add_flags(parser)
    return parser
