"""What ends a run of several processes: each way ends all of them, with one line that says why."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from prepared import prepared
from together import ROOT, command, environment, losses, needs_mpi, told

from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands.main import main
from tinygpt.training import run_files

SETTINGS = [
    "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=12", "--steps=30",
    "--eval-every=10", "--eval-batches=3", "--sample-tokens=0", "--rank-timeout=4",
]  # fmt: skip
# The program, in one rank of which something happens in the middle of a step: KIND RANK STEP ...
FAILING = """
import errno, os, signal, sys
from tinygpt.commands.main import main
from tinygpt.training import run_files
from tinygpt.training.ranks import Ranks

kind, rank, at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
count, usual, write = 0, Ranks.reduce, run_files.add_entry

def fail():
    if kind == "exception":
        raise RuntimeError("so it happened")
    if kind == "exit":
        sys.exit(3)
    if kind == "full":
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        run_files.add_entry = full
    if kind in ("KILL", "STOP", "TERM"):
        os.kill(os.getpid(), getattr(signal, "SIG" + kind))

def reduce(self, numbers):
    global count
    count += 1
    if self.rank == rank and count == at:
        fail()
    found = usual(self, numbers)
    if kind == "weights" and self.rank == rank and count == at:
        self._flat[:8] += 1
    return found

Ranks.reduce = reduce
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of one process that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", str(data), "-o", str(folder), *SETTINGS]) == 0
    return folder


def resumed(run: Path, data: Path, whole: Path) -> None:
    """What is left goes on, and comes to the uninterrupted run's losses."""
    run_files.verify(checkpoint_in(run, "last"))
    assert main(["train", str(data), "-o", str(run), "--resume"]) == 0
    ours, theirs = losses(run), losses(whole)
    assert theirs.keys() - ours.keys() <= {14}  # which a full disk has not in its log
    assert all(
        ours[step] == (pytest.approx(theirs[step][0], abs=1e-4), theirs[step][1]) for step in ours
    )


@needs_mpi
@pytest.mark.parametrize(
    ("kind", "rank", "words"),
    [
        ("exception", 1, "error: rank 1: RuntimeError: so it happened (<string>, line 12)"),
        ("exit", 1, "error: rank 1: the program was ended by sys.exit(3)"),
        ("full", 0, "log.jsonl: no space left on device; step 14 is saved"),
        ("STOP", 1, "error: rank 0: rank 1 did not come to the next step within 4 s"),
        ("KILL", 1, None),  # of which mpirun tells
        ("weights", 1, "error: the weights of rank 1 are not those of rank 0 at step 20"),
    ],
)
def test_what_ends_one_rank_ends_all(kind, rank, words, data, whole, tmp_path):
    argv = [kind, rank, 14, "train", data, "-o", tmp_path / "run", *SETTINGS]
    run = subprocess.run(
        command(3, *argv, code=FAILING),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd=ROOT,
        env=environment(),
    )
    assert run.returncode != 0
    errors = [line for line in told(run.stderr) if "error" in line]
    if words is None:
        assert not errors
        assert "signal 9" in run.stderr
    else:
        (line,) = errors
        assert words in line
    assert "Traceback" not in run.stderr
    resumed(tmp_path / "run", data, whole)
