"""`mpirun` as the tests start it: the program, or Python code, in several processes at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MPIRUN = shutil.which(
    "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
)
needs_mpi = pytest.mark.skipif(
    not MPIRUN or not find_spec("mpi4py"), reason="needs Open MPI and mpi4py: the extra mpi"
)
# More processes than cores, and containers in which all is root's.
_ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def command(ranks: int, *argv: object, code: str | None = None) -> list[str]:
    """The command line that starts the program, or code that is given its arguments."""
    program = [str(ROOT / "run.py")] if code is None else ["-c", code]
    start = [str(MPIRUN), "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [*start, sys.executable, *program, *map(str, argv)]


def and_one(folder: Path, *argv: object) -> list[str]:
    """What follows a command line for one more process with other arguments, in another folder."""
    program = [sys.executable, str(ROOT / "run.py"), *map(str, argv)]
    return [":", "-n", "1", "-wdir", str(folder), *program]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **_ALLOWED, **changes}


def mpirun(
    ranks: int, *argv: object, code: str | None = None, timeout: float = 120, **changes: str
) -> tuple[int, str, list[str]]:
    """Run to the end: exit status, stdout, and what of stderr the program itself has told."""
    run = subprocess.run(
        command(ranks, *argv, code=code),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        cwd=ROOT,
        env=environment(**changes),
    )
    return run.returncode, run.stdout, told(run.stderr)


def told(errors: str) -> list[str]:
    """The lines that the program tells, without those of mpirun."""
    return [line for line in errors.splitlines() if line.startswith("tinygpt: ")]


def log(run: Path) -> list[dict]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(run: Path) -> dict[int, tuple[float, str]]:
    """Of each step, its loss and the checksum of its tokens."""
    return {e["step"]: (e["loss"], e["tokens"]) for e in log(run) if "loss" in e}
