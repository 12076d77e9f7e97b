"""One training at a time in a folder: who holds it, and whose lock is an old one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tinygpt import InputError
from tinygpt.training.lock import locked

HOLD = """
import sys
from pathlib import Path
from tinygpt.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(run: Path) -> subprocess.Popen:
    """Another process, which holds a folder."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(run)]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[2])
    assert child.stdout.readline() == b"held\n"
    return child


def description(run: Path) -> Path:
    """The file that says who holds a folder."""
    [file] = (run / ".lock").iterdir()
    return file


def left_behind(run: Path) -> Path:
    """What the lock of a killed process leaves."""
    child = holding(run)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return description(run)


def test_a_second_training_is_told_who_holds_the_folder(tmp_path):
    child = holding(tmp_path / "run")
    words = rf"in use by another training, process {child.pid} on '.*', since '20.*remove .*\.lock"
    with pytest.raises(InputError, match=words) as caught, locked(tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value)
    (tmp_path / "run" / "mine").touch()
    child.communicate(b"")
    assert child.returncode == 0
    with locked(tmp_path / "run"):  # it has gone, and its lock with it
        assert (tmp_path / "run" / ".lock").is_dir()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_the_lock_of_a_killed_process_is_in_nobodys_way(tmp_path):
    file = left_behind(tmp_path)
    assert file.is_file()
    with locked(tmp_path):
        assert json.loads(description(tmp_path).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not file.parent.exists()


@pytest.mark.parametrize(
    ("change", "is_held"),
    [
        ({}, True),
        ({"started": "1"}, False),  # the number was given to another process
        ({"boot": "before"}, False),  # the machine was started anew
        ({"pid": 2**40}, False),
        ({"pid": -1}, False),
        ({"host": "elsewhere"}, True),  # which cannot be asked from here
        ({"host": "elsewhere", "pid": 2**40}, True),
        ({"pid": "x"}, False),
        ({"more": 1}, False),
        ({"folder": "/elsewhere"}, True),  # one folder, seen under two paths
        ({"folder": "/elsewhere", "inode": [1, 2]}, False),  # it was copied with its run
        ({"folder": "/elsewhere", "inode": None}, False),
        ({"inode": [1, 2]}, True),
        ({"folder": "/elsewhere", "inode": [1, 2], "host": "elsewhere"}, True),
    ],
)
def test_a_lock_is_believed_while_its_process_can_be_there(change, is_held, tmp_path):
    with locked(tmp_path):
        mine = json.loads(description(tmp_path).read_text(encoding="utf-8"))
    file = tmp_path / ".lock" / "old.json"
    file.parent.mkdir()
    file.write_text(json.dumps(mine | change), encoding="utf-8")
    if is_held:
        with pytest.raises(InputError, match="in use by another training"), locked(tmp_path):
            pass
        assert json.loads(file.read_text(encoding="utf-8")) == mine | change
    else:
        with locked(tmp_path):
            assert json.loads(description(tmp_path).read_text(encoding="utf-8")) != mine | change
        assert not file.parent.exists()


def test_the_lock_in_a_copy_of_a_running_run_is_in_nobodys_way(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "mine").touch()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with locked(tmp_path / "copy"):
            pass
        with pytest.raises(InputError, match="in use"), locked(tmp_path / "copy" / ".." / "run"):
            pass
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}" * 9])
def test_a_damaged_lock_is_in_nobodys_way(content, tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "holder.json").write_bytes(content)
    with locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("at", range(12))
def test_of_many_that_find_an_old_lock_one_gets_the_folder(at, tmp_path, monkeypatch):
    """Whatever others do just before and after one step of one that takes it."""
    left_behind(tmp_path)
    calls, hold, taken = itertools.count(), ExitStack(), []

    def take() -> None:
        with suppress(InputError):
            taken.append(hold.enter_context(locked(tmp_path)))

    def among_others(usual):
        def step(*args, **kwargs):
            number = next(calls)
            if number == at:
                take()
            try:
                return usual(*args, **kwargs)
            finally:
                if number == at:
                    take()

        return step

    for name in ("rename", "unlink", "rmdir", "listdir"):
        monkeypatch.setattr(os, name, among_others(getattr(os, name)))
    take()
    assert len(taken) == 1
    with pytest.raises(InputError, match="in use"), locked(tmp_path):
        pass
    hold.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    words = r"cannot write .*pass another --out"
    with pytest.raises(InputError, match=words), locked(tmp_path / "file" / "run"):
        pass


def test_a_refused_first_try_leaves_no_folder(tmp_path):
    for run in (tmp_path / "new", tmp_path / "new" / "p" / "q"):
        with pytest.raises(InputError), locked(run):
            raise InputError("no")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError), locked(tmp_path / "new" / ("q" * 300)):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()
