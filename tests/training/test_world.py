"""What ends a run of several processes: each way ends all of them, with one line that says why."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepared import TEXT, prepared
from together import ROOT, and_one, command, environment, losses, mpirun, needs_mpi, told

from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands.main import main
from tinygpt.training import run_files, world

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
    if rank in (self.rank, -1) and count == at:
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
        ("exception", -1, "error: rank 0: RuntimeError: so it happened (<string>, line 12)"),
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
    if kind == "weights":  # of which none are kept
        assert checkpoint_in(tmp_path / "run", "last").name == "step-00000010"
    resumed(tmp_path / "run", data, whole)


# The program, once some statements are carried out in each rank.
CHANGED = """
import os, sys
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
exec(sys.argv[1])
from tinygpt.commands.main import main
sys.exit(main(sys.argv[2:]))
"""


def refused(ranks: int, data: Path, folder: Path, *more: object, changes: str = "") -> str:
    """The one line with which several processes refuse to begin."""
    argv = ["train", data, "-o", folder / "run", *SETTINGS, *more]
    code = {"code": CHANGED} if changes else {}
    status, out, errors = mpirun(ranks, *([changes] if changes else []), *argv, **code)
    assert status in (2, 213)  # now and then mpirun ends before it has seen how its processes did
    assert not out
    assert not (folder / "run").exists()
    (line,) = errors
    return line.removeprefix("tinygpt: error: ")


@needs_mpi
def test_a_batch_that_ranks_cannot_share_is_refused(data, tmp_path):
    line = refused(2, data, tmp_path, "--batch-size=7")
    assert line.startswith("--batch-size is 7, which 2 ranks cannot share evenly")
    assert "6 and 8" in line


@needs_mpi
def test_a_wrong_flag_is_told_once(data, tmp_path):
    assert refused(2, data, tmp_path, "--n-layer=0").startswith("--n-layer is 0")


NEEDED = "mpirun has started 2 processes, which need mpi4py"


@needs_mpi
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            "import tinygpt; tinygpt.__version__ = f'9.{rank}'",
            "tinygpt: rank 1 has 9.1, rank 0 9.0",
        ),
        ("sys.byteorder = ['little', 'big'][rank]", "byte order: rank 1 has big, rank 0 little"),
        ("sys.argv += [f'--steps={rank}']", "--steps: rank 1 has 1, rank 0 0"),
        (
            "if rank: os.environ['TINYGPT_KERNELS'] = '0'",
            "backend: rank 1 has CPU (clang), plain operations, rank 0 CPU (clang), C operations",
        ),
        ("sys.modules['mpi4py'] = None", NEEDED),
        ("sys.modules['mpi4py'] = None; import time; time.sleep(1 - rank)", NEEDED),
        ("if rank: sys.modules['mpi4py'] = None", NEEDED),
        ("if rank: sys.argv[-1] = '--batch=0'", "rank 1: unknown argument '--batch'"),
        ("if rank: sys.argv += ['--help']", "rank 1 was to show its help, and another was not"),
        ("sys.argv[2:] = ['evaluate', 'tales', 'x']", "`tinygpt evaluate` is for one: start it"),
        ("sys.argv[2:] = ['A fox']", "`tinygpt generate` is for one: start it without mpirun"),
        ("sys.argv[2:] = ['trian']", "unknown command 'trian': did you mean 'train'?"),
    ],
)
def test_ranks_that_differ_are_refused(changes, words, data, tmp_path):
    assert words in refused(2, data, tmp_path, changes=changes)


@needs_mpi
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "rank 1: data/header.json: no such file or directory (each rank reads"),
        (TEXT * 2, "rank 1: data: the SHA-256 of train.bin is "),
    ],
)
def test_tokens_that_a_rank_lacks_are_named(text, words, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, each in zip(folders, (TEXT, text), strict=True):
        folder.mkdir()
        if each:
            prepared(folder / "data", each)
    argv = ["train", "data", "-o", tmp_path / "run", *SETTINGS]
    run = subprocess.run(
        [*command(1, *argv), *and_one(folders[1], *argv)],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        cwd=folders[0],
        env=environment(),
    )
    (line,) = [each for each in told(run.stderr) if "error" in each]
    assert words in line
    assert run.returncode == 2


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_that_comes_while_they_meet_ends_all(rank, data, tmp_path):
    changes = f"""
from tinygpt.commands.interrupts import Ended
from tinygpt.training.world import World
usual = World.__init__
def meet(self):
    usual(self)
    if rank == {rank}:
        raise Ended(15)
World.__init__ = meet"""
    argv = ["train", data, "-o", tmp_path / "run", *SETTINGS]
    status, out, _ = mpirun(3, changes, *argv, code=CHANGED, timeout=60)
    assert (status, out) == (128 + 15, "")


@needs_mpi
def test_what_is_shown_is_shown_once():
    for argv in (["--version"], ["train", "--help"]):
        status, out, errors = mpirun(2, *argv)
        assert (status, errors) == (0, [])
        alone = subprocess.run([sys.executable, "run.py", *argv], capture_output=True, cwd=ROOT)
        assert out == alone.stdout.decode()


@needs_mpi
def test_more_ranks_than_cores_are_a_warning(data, tmp_path):
    argv = ["train", data, "-o", tmp_path / "run", *SETTINGS, "--steps=1"]
    status, _, errors = mpirun(2, "os.sched_setaffinity(0, {0})", *argv, code=CHANGED)
    assert status == 0
    assert "2 ranks on 1 core: " in errors[0]


@needs_mpi
def test_a_signal_to_one_rank_stops_all_at_the_same_step(data, whole, tmp_path):
    argv = ["TERM", 1, 14, "train", data, "-o", tmp_path / "run", *SETTINGS]
    status, _, errors = mpirun(2, *argv, code=FAILING)
    assert status == 128 + signal.SIGTERM
    assert any("stopped at step 14, saved in" in line for line in errors)
    resumed(tmp_path / "run", data, whole)


@needs_mpi
def test_mpirun_passes_on_the_signal_that_stops_a_run(data, tmp_path):
    run = tmp_path / "run"
    argv = ["train", data, "-o", run, *SETTINGS, "--steps=1000000"]
    with subprocess.Popen(command(2, *argv), env=environment(), stderr=subprocess.PIPE) as process:
        while not checkpoint_in(run, "last"):
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signal.SIGUSR1
    state = run_files.read_state(checkpoint_in(run, "last"))
    assert f"stopped at step {state.counters.step}, saved in" in errors


@needs_mpi
def test_minutes_come_to_the_same_steps_in_all_ranks(data, tmp_path):
    run = tmp_path / "run"
    settings = [word for word in SETTINGS if "--steps" not in word]
    assert mpirun(2, "train", data, "-o", run, *settings, "--minutes=0.03")[0] == 0
    state = run_files.read_state(checkpoint_in(run, "last"))
    assert state.counters.step == state.config.steps


def test_nothing_of_mpi_is_imported_by_one_process(monkeypatch):
    code = (
        "import sys; from tinygpt.commands import train; "
        "from tinygpt.training.world import joined\n"
        "with joined(): print('mpi4py' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=True
    )
    assert run.stdout == "False\n"


def test_a_number_of_open_mpis_environment(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    assert world.variable("SIZE", 1) == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert world.variable("SIZE", 1) == 4
