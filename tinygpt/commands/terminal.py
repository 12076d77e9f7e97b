"""What every command shares with the person at the terminal: its flags, and its words on stderr."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import NoReturn

from tinygpt.errors import InputError

# The kinds of flags there are, as argparse wants them.
KINDS = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    list: {"action": "append", "metavar": "TEXT"},
    True: {"action": "store_true"},
    False: {"action": "store_const", "const": False},
}


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line that offers the nearest flag."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            given = message.split()[2].split("=")[0]
            message = f"unknown argument {given!r}"
            if near := get_close_matches(given, self._option_string_actions, n=1):
                message += f": did you mean {near[0]}?"
            elif not given.startswith("-"):
                message += ": put a prompt of several words in quotes"
        raise InputError(f"{message} (`{self.prog} --help` lists what there is)")
