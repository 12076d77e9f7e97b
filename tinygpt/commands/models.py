"""List the models that are on this machine, or remove one that was fetched."""

from __future__ import annotations

import argparse

from tinygpt.checkpoints import hub
from tinygpt.commands.flags import add_flag
from tinygpt.errors import one_line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt models`."""
    words = "remove a model that tinygpt has fetched; never one of another program"
    add_flag(parser, "--remove", metavar="NAME", help=words)


def run(args: argparse.Namespace) -> int:
    """`tinygpt models`: print a line for each model: its name, its size, and where it is."""
    if args.remove is not None:
        print(one_line(str(hub.remove(args.remove))))
        return 0
    found = list(hub.local_models())
    width = max(len(model.name) for model in found)
    for model in found:
        line = f"{model.name:<{width}}  {model.size_bytes / 1e6:>8.1f} MB  {model.where}"
        print(one_line(line))
    return 0
