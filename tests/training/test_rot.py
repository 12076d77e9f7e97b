"""Bits of a run that have turned on the disk: each is seen before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from prepared import state
from program import is_refused
from tinygrad import Tensor

from tinygpt import GPT, load_tokenizer
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.errors import CheckpointError
from tinygpt.training import run_files

LAST, BEST = "step-00000004", "step-00000002"


class Killed(BaseException):
    """What stands for a signal that nothing can catch."""


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file; turned again, it is as it was."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def files_of(run: Path) -> list[Path]:
    return sorted(path for step in (LAST, BEST) for path in (run / step).iterdir())


def test_every_bit_that_has_turned_is_seen_when_a_run_goes_on(run, resume):
    draw, seen = random.Random(0), 0
    files = files_of(run)
    kinds = {path.name for path in files}
    assert kinds >= {"model.safetensors", "training.safetensors", "config.json", "state.json"}
    assert kinds >= {"vocab.json", "merges.txt", "generation_config.json", "SHA256SUMS"}
    for path in files:
        # Of a list of digests another file may be named, which is not as that says.
        named = str(path.parent if path.name == "SHA256SUMS" else path)
        count = 8 * path.stat().st_size
        # The last byte too, which is often no more than the end of a line.
        for bit in {*(draw.randrange(count) for _ in range(60)), count - draw.randint(1, 8)}:
            flip(path, bit)
            with pytest.raises(CheckpointError, match=re.escape(named)):
                run_files.newest(run)
            flip(path, bit)
            seen += 1
    assert seen > 900
    for path in [*files, *(run / name for name in ("last", "best", "data/train.bin"))]:
        flip(path, bit := draw.randrange(8 * path.stat().st_size))
        named = path.parent if path.name == "SHA256SUMS" else path
        assert is_refused(resume(), str(named))
        flip(path, bit)
    assert resume()[0] == 0


def test_every_single_bit_of_a_name_is_seen(run):
    for path in (run / "last", run / "best"):
        for bit in range(8 * path.stat().st_size):
            flip(path, bit)
            with pytest.raises(CheckpointError, match=rf"{path} .*: remove it or write step-0+\d"):
                run_files.newest(run)
            flip(path, bit)
    assert run_files.newest(run).name == LAST


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("change", ["cut", "emptied", "removed", "a folder", "longer"])
def test_a_file_that_is_cut_or_gone_is_seen(name, change, run, resume):
    path = run / LAST / name
    content = path.read_bytes()
    path.unlink()
    if change == "a folder":
        path.mkdir()
    elif change != "removed":
        cut = content[: content.rindex(b"\n", 0, -1) + 1]  # of lines, at the end of one
        path.write_bytes({"cut": cut, "emptied": b"", "longer": content + b"\n"}[change])
    answer = resume()
    assert is_refused(answer, str(run)), answer
    assert LAST in answer[2]


def test_what_is_said_of_rot_leads_on(run, resume):
    """The last checkpoint is rotten: the one before is offered, and gone on from."""
    path = run / LAST / "training.safetensors"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    flip(path, 999)
    answer = resume()
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    fact = f"{path}: it is not as it was written: its SHA-256 is {now[:8]}..., not {before[:8]}..."
    assert is_refused(answer, f"{fact}: write {BEST} into {run / 'last'}, and --resume")
    (run / "last").write_text(f"{BEST}\n", encoding="utf-8")
    assert resume()[0] == 0
    assert checkpoint_in(run, "last").name == LAST
    assert run_files.verify(run / LAST)


def test_a_rotten_best_is_seen_and_can_be_done_without(run, resume):
    flip(run / BEST / "model.safetensors", 4321)
    words = f"remove {run / BEST} and {run / 'best'}, and --resume goes on without it"
    assert is_refused(resume(), words)
    shutil.rmtree(run / BEST)
    (run / "best").unlink()
    assert resume("--steps=6")[0] == 0


def test_where_no_checkpoint_is_whole_that_is_said(run, resume):
    for step in (LAST, BEST):
        flip(run / step / "config.json", 80)
    assert is_refused(resume(), "the run has no other checkpoint that is whole")


def test_a_run_of_before_there_were_digests_is_gone_on_with(run, resume):
    for step in (LAST, BEST):
        (run / step / "SHA256SUMS").unlink()
        path = run / step / "state.json"
        text = path.read_text(encoding="utf-8").replace("tinygpt training 2", "tinygpt training 1")
        path.write_text(text, encoding="utf-8")
    (run / "last").write_text(f"{LAST}\n", encoding="utf-8")
    assert resume("--steps=6")[0] == 0
    assert run_files.verify(checkpoint_in(run, "last"))


def test_digests_are_those_that_sha256sum_checks(run):
    for path in files_of(run):
        if path.name != "SHA256SUMS":
            line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
            assert line in (path.parent / "SHA256SUMS").read_text(encoding="utf-8")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=run / LAST, check=True)


@pytest.mark.parametrize(
    "name", ["../../text.txt", "/etc/passwd", "data/../x", "", "a b", "\x1b[1m"]
)
def test_a_list_of_digests_leads_nowhere_else(name, run, resume):
    digest = hashlib.sha256((run.parent / "text.txt").read_bytes()).hexdigest()
    with open(run / LAST / "SHA256SUMS", "a", encoding="utf-8") as file:
        file.write(f"{digest}  {name}\n")
    assert is_refused(resume(), "SHA256SUMS: it is damaged")


def test_a_checkpoint_killed_while_it_is_written_leaves_one_that_is_whole(
    trained, tmp_path, monkeypatch
):
    """Each system call by which a name appears may be the last: what it leaves is gone on from."""
    model, tokenizer = GPT.from_pretrained(trained / "run"), load_tokenizer(trained / "run")
    tensors, left = {"a": Tensor([1.0, 2.0])}, 0

    def may_end(call):
        def ending(*args):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return call(*args)

        return ending

    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the killed tidy nothing up
    run_files.save(tmp_path / "before", model, tokenizer, tensors, state(1))
    for count in range(100):
        run = Path(shutil.copytree(tmp_path / "before", tmp_path / str(count)))
        left = count
        with monkeypatch.context() as patch, suppress(Killed):
            for name in ("rename", "replace", "fsync", "unlink"):
                patch.setattr(os, name, may_end(getattr(os, name)))
            run_files.save(run, model, tokenizer, tensors, state(2))
        last = run_files.newest(run)
        assert run_files.verify(last)
        assert run_files.read_state(last).counters.step == int(last.name[5:])
        if left:
            break
    assert count > 20
    assert last.name == "step-00000002"


def test_the_doctor_of_a_run_says_what_is_whole_and_what_is_not(cli, run):
    status, out, _ = cli("doctor", run)
    assert status == 0
    rows = {line[:15].strip(): line[15:] for line in out.splitlines()}
    assert rows == {"best": f"is {BEST}", "last": f"is {LAST}"} | dict.fromkeys(
        (LAST, BEST, "data"), "as it was written"
    )
    for path in (run / BEST / "vocab.json", run / "data" / "val.bin"):
        flip(path, 77)
    flip(run / "last", 9)
    status, out, _ = cli("doctor", run)
    assert status == 1
    damaged = re.findall(r"(?m)^(\S+) +DAMAGED: (\S+)", out)
    assert damaged == [
        ("last", str(run / "last")),
        (BEST, f"{run / BEST / 'vocab.json'}:"),
        ("data", f"{run / 'data' / 'val.bin'}:"),
    ]
    for path in (run / LAST, run / BEST, run / "best"):
        status, out, _ = cli("doctor", path)
        assert (status, "DAMAGED" in out) == ((0, False) if path == run / LAST else (1, True))
        assert len(out.splitlines()) == 1


def test_the_doctor_is_told_that_something_is_no_run(cli, tmp_path):
    assert is_refused(cli("doctor", tmp_path), "is no run: give the folder of one")
    assert is_refused(cli("doctor", tmp_path / "none"), "is no run")


def test_no_checkpoint_holds_what_json_has_no_word_for(run):
    for step in (LAST, BEST):
        for path in (run / step).glob("*.json"):
            json.loads(path.read_bytes(), parse_constant=lambda word: pytest.fail(word))
