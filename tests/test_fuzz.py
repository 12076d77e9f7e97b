"""Damaged files of every form, in a process that is watched: see `fuzz`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz.py")


def fuzz(count: int, first: int = 0) -> dict:
    for package in ("torch", "transformers", "safetensors", "gguf"):
        pytest.importorskip(package)
    command = [sys.executable, PROGRAM, "--count", str(count), "--first", str(first)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PROGRAM.parents[1])
    assert run.returncode in (0, 1), run.stderr
    found = json.loads(run.stdout)
    assert found["faults"] == []
    assert found["files"] == count
    assert found["slowest_s"] < 5
    assert found["peak_memory_bytes"] < 1e9
    return found


def test_a_few_hundred_damaged_files():
    outcomes = fuzz(300, first=10**6)["outcomes"]
    assert sum(count for name, count in outcomes.items() if name.endswith("is refused")) > 100


def test_files_as_full_as_can_be():
    command = [sys.executable, PROGRAM, "--full"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PROGRAM.parents[1])
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_twenty_thousand_damaged_files():
    outcomes = fuzz(20_000)["outcomes"]
    assert len(outcomes) == 2 * 10  # of each of ten forms some load, and some are refused
    assert min(outcomes.values()) >= 20
