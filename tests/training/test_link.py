"""Two ranks on two machines, which are namespaces of the network with a link between them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from prepared import prepared
from together import MPIRUN, ROOT, environment, losses, needs_mpi, told

from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands.main import main
from tinygpt.training import run_files

SETTINGS = [
    "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=12", "--steps=400",
    "--eval-every=50", "--eval-batches=3", "--sample-tokens=0", "--rank-timeout=4",
]  # fmt: skip
# A world of its own, whoever starts it, and all of its processes end with it.
APART = [
    "unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child",
    "--mount-proc",
]  # fmt: skip
MACHINES = """
set -e
mount -t tmpfs tmpfs /run
export TMPDIR=/run  # what `mpirun` leaves there has the names of its processes' numbers
for i in 1 2; do
  ip netns add machine$i
  ip link add port type veth peer name cable$i
  ip link set port netns machine$i
done
ip link add name switch type bridge
ip link set switch up
for i in 1 2; do
  ip link set cable$i master switch up
  ip -n machine$i addr add 10.1.0.$i/24 dev port
  ip -n machine$i link set lo up
  ip -n machine$i link set port up
done
"""
# Its arguments are the command; there is a file `cut` once the link is to break.
SCRIPT = """
cat > /run/start <<'END'
#!/bin/sh
shift
exec ip netns exec machine2 sh -c "$*"
END
chmod +x /run/start
ip netns exec machine1 "$@" &
until [ -e cut ]; do sleep 0.05; done
ip link set cable2 down
wait
"""
OVER_IT = [
    "--prtemca", "plm_ssh_agent", "/run/start", "--prtemca", "prte_if_include", "10.1.0.0/24",
    "--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "10.1.0.0/24",
    "--host", "10.1.0.1:1,10.1.0.2:1", "-x", "PYTHONPATH", "-x", "DEV", "-x", "PATH",
]  # fmt: skip


def _can_be_apart() -> bool:
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    run = subprocess.run([*APART, "bash", "-c", MACHINES], capture_output=True, check=False)
    return run.returncode == 0


def ranks_of(run: Path) -> list[int]:
    """The processes that train in a folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == sys.executable.encode() and str(run).encode() in words:
            found.append(int(folder.name))
    return found


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n")


@needs_mpi
@pytest.mark.skipif(not _can_be_apart(), reason="needs namespaces of the network, and `ip`")
def test_a_link_that_is_cut_ends_the_ranks_on_both_sides(tmp_path):
    data, run, whole = prepared(tmp_path / "data"), tmp_path / "run", tmp_path / "whole"
    argv = ["train", data, "-o", run, *SETTINGS]
    command = [MPIRUN, "-n", "2", "--bind-to", "none", *OVER_IT, sys.executable, ROOT / "run.py"]
    with subprocess.Popen(
        [*APART, "bash", "-c", MACHINES + SCRIPT, "world", *map(str, [*command, *argv])],
        stderr=subprocess.PIPE, encoding="utf-8", cwd=tmp_path, env=environment(),
    ) as world:  # fmt: skip
        ends = Timer(120, world.kill)  # if nothing else does
        ends.start()
        try:
            while not (run / "log.jsonl").exists() or lines_of(run / "log.jsonl") < 130:
                assert world.poll() is None, world.communicate()[1]
                time.sleep(0.01)
            assert len(ranks_of(run)) == 2
            (tmp_path / "cut").touch()
            while ranks_of(run):
                time.sleep(0.05)
        finally:  # `mpirun` waits for its other half
            world.kill()
            ends.cancel()
        (line,) = [line for line in told(world.stderr.read()) if "error" in line]
    assert "did not come to the next step within 4 s" in line
    run_files.verify(checkpoint_in(run, "last"))
    assert main(["train", str(data), "-o", str(run), "--resume"]) == 0
    assert main(["train", str(data), "-o", str(whole), *SETTINGS]) == 0
    (ours, tokens), (theirs, same) = (losses(each)[400] for each in (run, whole))
    assert (ours, tokens) == (pytest.approx(theirs, abs=1e-4), same)
