"""Print what makes a shell complete this program's commands and flags, from their declarations."""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module

from tinygpt.commands.flags import Parser
from tinygpt.commands.main import VERBS
from tinygpt.errors import unknown

_SHELLS = {
    "bash": 'eval "$(tinygpt completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(tinygpt completion zsh)" in ~/.zshrc',
    "fish": "tinygpt completion fish | source in ~/.config/fish/config.fish",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt completion`."""
    words = "; ".join(f"{shell}: {line}" for shell, line in _SHELLS.items())
    parser.add_argument("shell", metavar="SHELL", help=words)


def run(args: argparse.Namespace) -> int:
    """`tinygpt completion`: print the shell's script."""
    if args.shell not in _SHELLS:
        raise unknown("shell", args.shell, _SHELLS)
    print(_fish() if args.shell == "fish" else _bash(zsh=args.shell == "zsh"))
    return 0


def _flags(verb: str) -> list[argparse.Action]:
    parser = Parser(prog="tinygpt", allow_abbrev=False)
    import_module(f"tinygpt.commands.{verb}").add_flags(parser)
    return [action for action in parser._actions if action.option_strings]


def _choices(action: argparse.Action) -> tuple[str, ...]:
    return getattr(action, "kind", None).choices if hasattr(action, "kind") else ()


def _bash(zsh: bool) -> str:
    """A function for bash's `complete`, which zsh takes too."""
    cases, values = [], {}
    for verb in VERBS:
        flags = _flags(verb)
        words = " ".join(spelling for action in flags for spelling in action.option_strings)
        more = f"{words} {' '.join(VERBS)}" if verb == "generate" else words
        name = "generate|*" if verb == "generate" else verb
        cases.append(f"    {name}) words={shlex.quote(more)} ;;")
        for action in flags:
            if choices := _choices(action):
                values |= dict.fromkeys(action.option_strings, choices)
    cases.sort(key=lambda case: "*" in case)  # what stands for all others comes last
    choices = [
        f"    {flag}) words={shlex.quote(' '.join(names))} ;;" for flag, names in values.items()
    ]
    lines = [
        "_tinygpt() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" words',
        '  case "${COMP_WORDS[1]}" in',
        *cases,
        "  esac",
        '  case "$prev" in',
        *choices,
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$cur"))',
        "}",
        "complete -o default -F _tinygpt tinygpt",  # where nothing fits, names of files
    ]
    if zsh:
        lines.insert(0, "autoload -Uz compinit bashcompinit && compinit && bashcompinit")
    return "\n".join(lines)


def _fish() -> str:
    quote = shlex.quote
    lines = []
    for verb, words in VERBS.items():
        lines.append(f"complete -c tinygpt -n __fish_use_subcommand -a {verb} -d {quote(words)}")
        seen = f"__fish_seen_subcommand_from {verb}"
        if verb == "generate":  # whose flags are those of the program without a command
            seen += "; or __fish_use_subcommand"
        for action in _flags(verb):
            parts = [f"complete -c tinygpt -n {quote(seen)}"]
            for spelling in action.option_strings:
                parts.append(f"-l {spelling[2:]}" if spelling[:2] == "--" else f"-s {spelling[1:]}")
            if choices := _choices(action):
                parts.append(f"-x -a {quote(' '.join(choices))}")
            elif action.nargs != 0:
                parts.append("-r")
            parts.append(f"-d {quote((action.help or '').replace('%%', '%'))}")
            lines.append(" ".join(parts))
    return "\n".join(lines)
