"""Damaged files of every form, in a process that is watched: see `fuzz`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import writers
from fuzz import write_seeds

PROGRAM = Path(__file__).parents[1] / "fuzz.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = PROGRAM.parents[1]
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        encoding="utf-8",
    )  # fmt: skip


@pytest.fixture
def seeds(tmp_path, monkeypatch) -> Path:
    """Written here, since this process mostly has the packages already that it takes."""
    for package in ("torch", "transformers", "safetensors", "gguf"):
        pytest.importorskip(package)
    monkeypatch.setitem(writers.SHAPE, "n_layer", 1)
    write_seeds(str(tmp_path))
    return tmp_path


def fuzz(seeds: Path, count: int, first: int = 0) -> dict:
    done = run("--count", count, "--first", first, "--seeds", seeds)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert found["files"] == count
    assert found["slowest_s"] < 5
    assert found["peak_memory_bytes"] < 1e9
    return found


def test_a_few_hundred_damaged_files(seeds):
    outcomes = fuzz(seeds, 300, first=10**6)["outcomes"]
    assert sum(count for name, count in outcomes.items() if name.endswith("is refused")) > 100


@pytest.mark.slow
def test_files_as_full_as_can_be():
    done = run("--full")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_twenty_thousand_damaged_files(seeds):
    outcomes = fuzz(seeds, 20_000)["outcomes"]
    assert len(outcomes) == 2 * 14  # of each form some load, and some are refused
    assert min(outcomes.values()) >= 20
