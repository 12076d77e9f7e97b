"""What a command has to have alike in all processes that `mpirun` has started for it."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version

from tinygpt import __version__
from tinygpt.commands.flags import flag_of
from tinygpt.errors import InputError, show
from tinygpt.runtime import device


def facts(args: argparse.Namespace) -> dict[str, str]:
    """What has to be the same in all ranks: programs, what computes, and what was typed.

    Raises:
        InputError: for flags that are for one process.
    """
    if args.devices > 1:
        raise InputError("--devices is for one process: under mpirun each takes one device")
    found = {
        "tinygpt": __version__,
        "tinygrad": version("tinygrad"),
        "byte order": sys.byteorder,
        "processor": platform.machine(),
        "backend": f"{device.describe()}, {device.describe_operations()}",
    }
    flags = {name: value for name, value in vars(args).items() if name != "typed"}
    return found | {flag_of(name): show(value) for name, value in flags.items()}
