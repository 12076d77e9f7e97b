"""The one vocabulary of flags: how a flag is declared, read, checked and named in an error.

A flag that sets a field of a dataclass is declared by that field (see `options`) and added by
`add_options`; any other by `add_flag`. Both keep the spelling that was typed, so that an error can
speak in it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from tinygpt.checkpoints.quantization import DTYPES
from tinygpt.errors import InputError, show
from tinygpt.options import Kind, check_value, kinds

# What other programs call a flag of ours; each is taken wherever the flag is, and not in the help.
_ALIASES = {
    "--temperature": ("--temp",),
    "--learning-rate": ("--lr",),
    "--max-new-tokens": ("--max-tokens", "--n-predict", "--num-tokens"),
    "--num-samples": ("--n-samples", "--num-return-sequences"),
    "--repetition-penalty": ("--repeat-penalty", "--rep-penalty"),
    "--block-size": ("--ctx-size", "--context-length"),
    "--steps": ("--max-iters", "--max-steps"),
    "--accumulate": ("--grad-accum", "--gradient-accumulation-steps"),
    "--out": ("--output", "--output-dir", "--out-dir"),
}
# Flags of other programs that are something else here.
_DEV = "the environment variable DEV chooses the device, as in `DEV=CUDA tinygpt ...`"
_ELSEWHERE = {
    **dict.fromkeys(("--device", "--gpu", "--cuda", "--cpu", "--mps", "--metal"), _DEV),
    "--threads": "the environment variable CPU_COUNT says how many threads to use",
    "--prompt": "the prompt stands by itself, as in `tinygpt 'To be'`, or in a --prompt-file",
    "--quiet": "what is not the text goes to stderr: add 2>/dev/null",
}

_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line that offers the nearest flag."""

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch("argument (.+): ignored explicit argument .+", message, re.DOTALL):
            message = f"{found[1]} takes no value"
        raise InputError(f"{message} (`{self.prog} --help` lists what there is)")

    def refuse(self, argument: str) -> NoReturn:
        """End with an argument that the command has no place for."""
        given = argument.split("=")[0] if argument.startswith("-") else argument
        message = f"unknown argument {show(given)}"
        if given in _ELSEWHERE:
            message += f": {_ELSEWHERE[given]}"
        elif near := self._near(given):
            message += f": did you mean {near}?"
        elif not given.startswith("-") and any(each.dest == "prompt" for each in self._actions):
            message += ": put a prompt of several words in quotes"
        self.error(message)

    def _near(self, given: str) -> str | None:
        """The flag that is meant by one that there is not, if it looks like one or begins one."""
        known = {
            spelling.lstrip("-"): spelling
            for action in self._actions
            for spelling in action.option_strings
            if spelling.startswith("--")
        }
        name = given.lstrip("-").replace("_", "-")
        if not given.startswith("-") or not name:
            return None
        near = [each for each in known if len(name) > 2 and each.startswith(name)]
        near += get_close_matches(name[:100], known, n=1, cutoff=0.75)
        return known[near[0]] if near else None


class _Flag(argparse.Action):
    """Reads and checks a flag's value, and keeps with it the spelling that was typed."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        kind: Kind,
        limits: Mapping[str, float],
        off: Collection[str],
        many: bool,
        **rest: Any,
    ) -> None:
        super().__init__(option_strings, dest, **rest)
        self.kind, self.limits, self.off, self.many = kind, limits, off, many

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values == "" and self.kind == Kind(
            str
        ):  # a path of no letters would mean the folder here
            raise InputError(f"{option_string} is empty: give it a value, or leave it out")
        value = option_string not in self.off if self.nargs == 0 else self._read(values)
        check_value(option_string or self.dest, value, self.kind, self.limits)
        if self.many:
            value = [*(getattr(namespace, self.dest) or []), value]
        setattr(namespace, self.dest, value)
        namespace.typed = {**getattr(namespace, "typed", {}), self.dest: option_string}

    def _read(self, text: str) -> Any:
        try:
            return self.kind.type(text)
        except ValueError:
            return text  # the check refuses it, and says what it should have been


def add_flag(
    parser: Any,
    *spellings: str,
    help: str,
    kind: type | Kind = str,
    default: Any = None,
    off: Sequence[str] = (),
    metavar: str | None = None,
    required: bool = False,
    many: bool = False,
    **limits: float,
) -> None:
    """Add a flag to a parser or a group of one.

    Args:
        spellings: how it may be typed.
        kind: what it takes: int, float or str; a bool takes nothing.
        default: the value where it is not given.
        off: further spellings of a bool, which make it False.
        metavar: what the help calls its value.
        many: it may be given more than once, and its values make a list.
        limits: those of a number: see `errors.check_int` and `errors.check_float`.
    """
    kind = kind if isinstance(kind, Kind) else Kind(kind)
    shown = (*spellings, *off)
    # Underscores are taken for dashes, as people type who know the names from Python.
    hidden = {each: _ALIASES.get(each, ()) for each in shown}
    hidden = {each: (*more, *map(_underscored, (each, *more))) for each, more in hidden.items()}
    off = [each for spelling in off for each in (spelling, *hidden[spelling])]
    takes: dict[str, Any] = {"nargs": 0}
    if kind.type is not bool:
        takes = {"metavar": metavar or "|".join(kind.choices) or _METAVARS[kind.type]}
    action = parser.add_argument(
        *shown,
        action=_Flag,
        kind=kind,
        limits=limits,
        off=off,
        many=many,
        default=default,
        required=required,
        help=help.replace("%", "%%"),
        **takes,
    )
    for each in hidden.values():
        for spelling in each:
            parser._option_string_actions.setdefault(spelling, action)


def _underscored(spelling: str) -> str:
    """`--top_p` for `--top-p`."""
    return "--" + spelling[2:].replace("-", "_") if spelling.startswith("--") else spelling


# The flags that several commands have in common.
_SHARED: dict[str, dict[str, Any]] = {
    "--devices": {"kind": int, "default": 1, "low": 1, "below": 1025},
    "--dtype": {
        "kind": Kind(str, choices=tuple(DTYPES)),
        "metavar": "TYPE",
        "help": f"hold the weights in {', '.join(DTYPES)} (default: as stored)",
    },
    "--json": {"kind": bool, "help": "print one JSON object"},
    "--plain": {
        "kind": bool,
        "help": "compute with the operations' definitions in plain tensors, not with their C",
    },
    "--tokenizer": {
        "metavar": "T",
        "help": "gpt2, bytes, or a folder (default: the model's own)",
    },
}


def add_shared(parser: Any, spelling: str, **changes: Any) -> None:
    """Add a flag that several commands have in common, with what is different here."""
    add_flag(parser, spelling, **{**_SHARED[spelling], **changes})


def add_options(
    parser: Any,
    owner: type,
    names: Collection[str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add the flags of a dataclass's fields; one that is not given leaves None.

    Args:
        names: which fields; all that have a flag by default.
        defaults: for the help, what stands for a field that is not given, where that is not the
            field's own default.
    """
    known = kinds(owner)
    for each in fields(owner):
        if each.metadata["flag"] and (names is None or each.name in names):
            kind = known[each.name]
            words = each.metadata["help"]
            default = (defaults or {}).get(each.name, _shown(each))
            if default:
                words += f" (default: {default})"
            off = (_negative(each.name), *each.metadata["off"]) if kind.type is bool else ()
            spellings = (flag_of(each.name), *each.metadata["short"])
            add_flag(parser, *spellings, help=words, kind=kind, off=off, **each.metadata["limits"])


def _shown(each: Field) -> str:
    """A field's default as the help writes it; "" where there is none."""
    if isinstance(each.default, bool):
        return "yes" if each.default else "no"
    return "" if each.default is None or each.default is MISSING else str(each.default)


def flag_of(name: str) -> str:
    """`--n-layer` for the field n_layer: each flag's first spelling."""
    return "--" + name.replace("_", "-")


def _negative(name: str) -> str:
    return "--no-" + name.replace("_", "-")


def given(args: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """The values that were given as flags, by the names of their fields."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def spelled(args: argparse.Namespace, elsewhere: Collection[str] = ()) -> Callable[[str], str]:
    """What an error calls a field: the flag as it was typed, or the flag that would set it.

    Args:
        elsewhere: fields whose values come from a file, where the field's own name stands.
    """
    typed = getattr(args, "typed", {})
    return lambda name: typed.get(name) or (name if name in elsewhere else flag_of(name))
