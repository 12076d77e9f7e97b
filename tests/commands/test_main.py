"""The command line: which command it is, and how each way to end looks to the shell."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from unittest.mock import Mock

import pytest
from program import ROOT, SHORT, finish, is_refused, start

from tinygpt import __version__
from tinygpt.commands.main import VERBS, main
from tinygpt.storage import atomic_file

pytestmark = pytest.mark.usefixtures("no_network")


def test_the_help_says_what_each_command_does_on_one_line(cli, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert max(map(len, lines)) <= 100
    for verb, words in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(words)}$", "\n".join(lines), re.MULTILINE)
    assert "random weights" not in " ".join(lines[:8])  # the default is the built-in model


@pytest.mark.parametrize("verb", VERBS)
def test_each_command_has_a_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: tinygpt {verb} ")
    assert VERBS[verb][1:] in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("chat", "unknown command 'chat': "),
        ("list", "unknown command 'list': "),
        ("TRAIN", "unknown command 'TRAIN': did you mean 'train'?"),
        ("trian", "unknown command 'trian': did you mean 'train'? allowed are generate, train, "),
        ("chat", "to continue it as a prompt: `tinygpt generate chat`"),
        ("evalute gpt2 data", "did you mean 'evaluate'?"),
        ("chat --model gpt2", "to continue it as a prompt: `tinygpt generate chat`"),
        ("--seed 3 evaluate x", "the command comes first: `tinygpt evaluate ...`"),
        ("--json trian", "the command comes first: `tinygpt train ...`; to continue that word as"),
        ("several words", "to continue it as a prompt: `tinygpt generate 'several words'`"),
        ("Several words", "unknown argument 'words': put a prompt of several words in quotes"),
    ],
)
def test_a_word_that_looks_like_a_command_is_no_prompt(cli, argv, words):
    assert is_refused(cli(*argv.split()), words)


@pytest.mark.parametrize("prompt", ["a chat", "Hi", "chat.", "x", "trian\n", "über"])
def test_anything_else_is_a_prompt(cli, prompt):
    assert cli(prompt, *SHORT, "--max-new-tokens", 0)[:2] == (0, f"{prompt}\n")


@pytest.mark.parametrize("prompt", ["chat", "train", "Hi there"])
def test_generate_continues_any_word(cli, prompt):
    status, out, _ = cli("generate", prompt, *SHORT)
    assert status == 0
    assert out.startswith(prompt)
    assert out == cli("generate", *SHORT, prompt)[1]


@pytest.mark.parametrize("name", ["tf\n\x1b[31m", "\x9b2J\u2028\u202e\r", "q" * 100_000])
@pytest.mark.parametrize(
    "argv",
    [
        ("x", "--model"), ("x", "--tokenizer"), ("x", "--prompt-file"), ("x", "--preset"), ("x",),
        ("generate", "x", "--steps"), ("convert", "--to", "hf", "out"), ("evaluate",),
        ("train", "-o", "run"), ("train", "README.md", "-o"), ("prepare",), ("models", "--remove"),
        ("completion",),
    ],
)  # fmt: skip
def test_what_is_quoted_in_an_error_moves_no_cursor_and_fills_no_screen(
    cli, argv, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    run = cli(*argv, name)
    assert is_refused(run, "")
    assert run[2][:-1].isprintable()
    assert len(run[2]) < 1500


def test_running_out_of_memory_is_one_line(cli, monkeypatch):
    monkeypatch.setattr("tinygpt.writer.GPT", lambda *_: [0] * 2**62)
    assert is_refused(cli("x", *SHORT), "out of memory")
    for error, words in (
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory (cannot allocate memory)"),
        (MemoryError("5 MiB more are not free"), "out of memory (5 MiB more are not free): choose"),
    ):
        monkeypatch.setattr("tinygpt.writer.GPT", Mock(side_effect=error))
        assert is_refused(cli("x", *SHORT), words)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no such limits")
@pytest.mark.parametrize("command", ["run.py x", "run.py train README.md -o run"])
def test_what_does_not_fit_a_limit_of_memory_is_told_its_need_and_what_there_is(command, tmp_path):
    words = command.split()
    argv = [*words[:-1], str(tmp_path / "run")] if words[-1] == "run" else words
    argv += ["--tokenizer", "bytes", *["--layers", "48", "--dim", "1600", "--heads", "25"]]
    script = f"ulimit -v 2000000; exec {shlex.join([sys.executable, *argv])}"
    run = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert is_refused((run.returncode, run.stdout, run.stderr.splitlines()[-1]), "MiB are free")
    need, free = re.search(
        r"needs ([\d,]+) MiB of memory, of which ([\d,]+) MiB", run.stderr
    ).groups()
    assert 5600 < int(need.replace(",", "")) < 7000
    assert 0 < int(free.replace(",", "")) < 1953


def test_run_py_and_the_module_and_the_command_are_one_program():
    runs = [start("--version"), start("--version", program=["-m", "tinygpt"])]
    assert [finish(run)[:2] for run in runs] == [(0, f"tinygpt {__version__}\n".encode())] * 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"tinygpt": "tinygpt.__main__:main"}


def test_a_reader_that_leaves_ends_the_run_quietly(endless):
    process = start(*endless)
    process.stdout.read(4)
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert status == 0
    assert all(line.startswith("tinygpt: ") for line in err.splitlines())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        status, _, err = finish(start("Hi", *SHORT, "--max-new-tokens", 0, stdout=full))
    assert is_refused((status, "", err.splitlines()[-1]), "no space left on device")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_what_cannot_be_told_on_stderr_changes_no_status():
    with open("/dev/full", "wb") as full:
        for argv, expected in ((["Hi", *SHORT], 0), (["--no-such-flag"], 2)):
            status, out, _ = finish(start(*argv, stderr=full))
            assert (status, bool(out)) == (expected, expected == 0)


def test_closed_standard_streams_are_no_traceback():
    for command, expected in (("run.py --version >&-", 0), ("run.py - <&-", 2)):
        command = f"{shlex.quote(sys.executable)} {command}"
        run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, encoding="utf-8")
        assert run.returncode == expected
        assert "Traceback" not in run.stderr


def test_a_backend_that_does_not_work_is_one_line(tmp_path):
    foo = start("x", *SHORT, env={"DEV": "FOO\n"})
    no_clang = start("x", *SHORT, env={"DEV": "CPU", "PATH": str(tmp_path), "CC": None})
    words = r"DEV=FOO\n does not work: tinygrad has no such backend. Set DEV to one of METAL, "
    assert is_refused(finish(foo), words)
    assert is_refused(finish(no_clang), "DEV=CPU does not work: no clang found. Unset DEV")


def test_a_compiler_that_fails_is_one_line(tmp_path):
    empty = str(tmp_path / "kernels.db")  # no kernel of an earlier run
    compiler = tmp_path / "clang"
    compiler.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    failing = start("x", *SHORT, env={"DEV": "CPU", "CC": str(compiler), "CACHEDB": empty})
    status, out, err = finish(failing)
    assert out == b"x\n"
    assert is_refused((status, "", err.splitlines()[-1]), "status 1. Unset DEV")


def test_without_clang_another_compiler_is_taken_and_said(tmp_path):
    env = {"DEV": None, "PATH": str(tmp_path), "CC": None}
    status, out, err = finish(start("Hi", *SHORT, "--max-new-tokens", 2, env=env))
    assert status == 0, err
    assert out.startswith(b"Hi")
    if " on CPU " in err:  # else the machine has a GPU
        assert re.search(
            r"no clang found, so .* \(CPU:\w+\), .* `pip install .*` brings a clang\n", err
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["prepare", "evaluate", "convert", "bench", "plot"])
def test_a_kill_or_a_closed_terminal_ends_any_command_with_nothing_half_written(
    verb, number, cli, monkeypatch, tmp_path
):
    def killed(_):
        with atomic_file(tmp_path / "file") as file:
            file.write(b"a part")
            os.kill(os.getpid(), number)
            time.sleep(60)

    command = import_module(f"tinygpt.commands.{verb}")
    monkeypatch.setattr(command, "add_flags", lambda parser: None)
    monkeypatch.setattr(command, "run", killed)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be put back
    usual = signal.signal(number, lambda *_: pytest.fail("nobody takes the signal"))
    try:
        assert cli(verb) == (128 + number, "", "")
    finally:
        signal.signal(number, usual)
    assert not list(tmp_path.iterdir())


def test_a_signal_that_a_destructor_swallows_comes_again(cli, monkeypatch):
    class Deaf:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def killed(_):
        Deaf()
        time.sleep(60)
        heard_late.append(True)
        return 0

    heard_late = []
    command = import_module("tinygpt.commands.plot")
    monkeypatch.setattr(command, "add_flags", lambda parser: None)
    monkeypatch.setattr(command, "run", killed)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    assert cli("plot")[0] == 128 + signal.SIGTERM
    assert not heard_late  # it wakes what waits
