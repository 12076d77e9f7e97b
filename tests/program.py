"""The program as the tests of the command line start it, and small models to start it with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tinygpt import GPTConfig

ROOT = Path(__file__).parents[1]
SHAPE = ["--layers", "1", "--heads", "1", "--dim", "16", "--context", "16"]
CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=257)  # nano with it
SHORT = [*SHAPE, "--max-new-tokens", "8", "--seed", "3"]


def start(
    *argv,
    program=("run.py",),
    env=None,
    stdin=None,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
) -> subprocess.Popen:
    """The program in a process of its own; None in `env` takes a variable away."""
    env = {**os.environ, **(env or {})}
    env = {name: value for name, value in env.items() if value is not None}
    command = [sys.executable, *program, *map(str, argv)]
    return subprocess.Popen(command, env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd=ROOT)


def finish(process: subprocess.Popen) -> tuple[int, bytes, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, (err or b"").decode(errors="replace")


def is_refused(run: tuple[int, str | bytes, str], words: str) -> bool:
    """Whether a run ended in one line that says why, with nothing on stdout."""
    status, out, err = run
    (line,) = err.splitlines()
    return status == 2 and not out and line.startswith("tinygpt: error: ") and words in line
