"""`tinygpt completion`: what the shells make of its output."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from program import is_refused

from tinygpt.commands.main import VERBS


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tinygpt eva", ["evaluate"]),
        ("tinygpt --temp", ["--temperature"]),
        ("tinygpt generate --top-", ["--top-k", "--top-p"]),
        ("tinygpt train --learn", ["--learning-rate"]),
        ("tinygpt train --norm p", ["pre", "post"]),
        ("tinygpt models --rem", ["--remove"]),
    ],
)
def test_bash_completes(cli, words, expected):
    split = words.split(" ")
    script = f"{cli('completion', 'bash')[1]}\nCOMP_WORDS=({words}); COMP_CWORD={len(split) - 1}\n"
    script += '_tinygpt; printf "%s\\n" "${COMPREPLY[@]}"'
    run = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert run.stdout.decode().split() == expected


def test_fish_and_zsh_know_every_command(cli):
    for shell in ("fish", "zsh"):
        status, out, _ = cli("completion", shell)
        assert status == 0
        assert all(verb in out for verb in VERBS)
    assert "-l n-layer" in cli("completion", "fish")[1]


def test_another_shell_is_refused(cli):
    assert is_refused(cli("completion", "fsh"), "did you mean 'fish'? allowed are bash, zsh, fish")
