"""What is no plain file, in the place of each file that is read: it is never waited for."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize, save_with_bytes
from program import CONFIG, is_refused

from tinygpt import GPT
from tinygpt.commands.plot import read_log
from tinygpt.data.token_file import TokenFile
from tinygpt.errors import CheckpointError
from tinygpt.storage import open_plain
from tinygpt.training.run_files import cut_log

TEXT = "To be, or not to be, that is the question.\n" * 20


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "device": lambda path: path.symlink_to("/dev/null"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "file of /proc": lambda path: path.symlink_to("/proc/self/environ"),
    "waiting file of /proc": lambda path: path.symlink_to("/proc/kmsg"),
    "memory in /proc": lambda path: path.symlink_to("/proc/self/mem"),
    "link through /proc": lambda path: path.symlink_to("/proc/self/root/proc/self/maps"),
    "file of /sys": lambda path: path.symlink_to("/sys/kernel/uevent_seqnum"),
}
MODEL = ["generate", "Hi", "-n", 1, "-m"]
# A file in a model's folder -> what is done with the folder. Not all must be there.
FILES: dict[str, list] = {
    "config.json": MODEL,
    "model.safetensors": MODEL,
    "tinygpt_tokenizer.json": MODEL,
    "vocab.json": MODEL,
    "merges.txt": MODEL,
    "tokenizer_config.json": MODEL,
    "generation_config.json": MODEL,
    "chat_template.jinja": MODEL,
    "tokenizer.json": MODEL,
    "model.safetensors.index.json": MODEL,
    "pytorch_model.bin": MODEL,
    "pytorch_model.bin.index.json": MODEL,
    "model.gguf": MODEL,
    "adapter_config.json": MODEL,
    "meta.pkl": MODEL,
    "state.json": MODEL,
    "best": MODEL,
    "last": MODEL,
}
INSTEAD = {  # what has to make place for it
    "model.safetensors.index.json": ["model.safetensors"],
    "pytorch_model.bin": ["model.safetensors"],
    "pytorch_model.bin.index.json": ["model.safetensors"],
    "model.gguf": ["model.safetensors", "config.json"],
    "vocab.json": ["tinygpt_tokenizer.json"],
    "merges.txt": ["tinygpt_tokenizer.json"],
    "tokenizer.json": ["tinygpt_tokenizer.json"],
    "tokenizer_config.json": ["tinygpt_tokenizer.json"],
    "chat_template.jinja": ["tinygpt_tokenizer.json"],
    "meta.pkl": ["tinygpt_tokenizer.json", "vocab.json", "merges.txt"],
    "state.json": ["config.json"],
    "best": ["config.json"],
    "last": ["config.json"],
}
# A file that is named itself.
NAMED: dict[str, list] = {
    "model.bin": [*MODEL, "{}"],
    "model": [*MODEL, "{}"],
    "tokenizer": ["generate", "Hi", "-n", 1, "--tokenizer", "{}"],
    "vocab.json": ["generate", "Hi", "-n", 1, "--tokenizer", "{}"],
    "x.pkl": ["generate", "Hi", "-n", 1, "--tokenizer", "{}"],
    "prompt": ["generate", "-n", 1, "--prompt-file", "{}"],
    "text.txt": ["train", "{}", "-o", "run", "--steps", 1],
    "text.jsonl": ["train", "{}", "-o", "run", "--field", "text"],
    "settings.toml": ["train", "shakespeare", "-o", "run", "--config", "{}"],
    "prepare.txt": ["prepare", "{}", "-o", "out"],
    "prepare.csv": ["prepare", "{}", "-o", "out", "--field", "a"],
    "evaluate.txt": ["evaluate", "shakespeare", "{}"],
    "lambada": ["evaluate", "shakespeare", "lambada", "{}"],
    "convert": ["convert", "{}", "out", "--to", "hf"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_with_bytes(randomize(GPT(CONFIG)), folder)
    return folder


@pytest.fixture(autouse=True)
def not_for_ever() -> Iterator[None]:
    """Make a failure of what would be waited for until the tests are stopped."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys are Linux's")
@pytest.mark.parametrize("odd", ODD)
def test_nothing_but_a_plain_file_is_read_of_a_model(
    odd, model, tmp_path, cli, no_network, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, argv in FILES.items():
        folder = tmp_path / f"of-{name}"
        shutil.copytree(model, folder)
        for other in (name, *INSTEAD.get(name, [])):
            (folder / other).unlink(missing_ok=True)
        ODD[odd](folder / name)
        status, _, err = cli(*argv, folder)
        assert status in (0, 2), (name, err)
        assert all(line.startswith("tinygpt: ") for line in err.splitlines()), (name, err)
        if name in ("config.json", "model.safetensors", "model.gguf", "best", "last"):
            assert status == 2, (name, err)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys are Linux's")
@pytest.mark.parametrize("odd", ODD)
def test_nothing_but_a_plain_file_is_read_of_what_is_named(
    odd, tmp_path, cli, no_network, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, argv in NAMED.items():
        path = tmp_path / name
        ODD[odd](path)
        run = cli(*[str(path) if word == "{}" else word for word in argv])
        assert is_refused((run[0], "", run[2].splitlines()[-1]), ""), (name, run)
    assert not (tmp_path / "out").exists()
    ODD[odd](tmp_path / "log.jsonl")
    with pytest.raises(CheckpointError):
        read_log(tmp_path)
    if (tmp_path / "log.jsonl").exists():
        with pytest.raises(CheckpointError):
            cut_log(tmp_path, 1)
    with pytest.raises(CheckpointError):
        TokenFile(tmp_path / "log.jsonl", np.dtype("<u2"), 0, 1, "")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys are Linux's")
@pytest.mark.parametrize("odd", [name for name in ODD if name != "link to nothing"])
def test_nothing_but_a_plain_file_is_written_as_a_runs_log(odd, tmp_path, cli):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    (tmp_path / "run").mkdir()
    ODD[odd](tmp_path / "run" / "log.jsonl")
    shape = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=4", "--batch-size=2"]
    run = cli("train", tmp_path / "text", "-o", tmp_path / "run", *shape, "--steps=1")
    line = run[2].splitlines()[-1]
    assert is_refused((run[0], "", line), f"cannot write {tmp_path / 'run' / 'log.jsonl'}: ")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data", "log.jsonl"]


def test_what_becomes_a_pipe_before_it_is_opened_is_no_plain_file(tmp_path, monkeypatch):
    (tmp_path / "plain").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    then = os.stat(tmp_path / "plain")
    monkeypatch.setattr(os, "stat", lambda *_, **__: then)
    with pytest.raises(OSError, match="no plain file"):
        open_plain(tmp_path / "pipe")


def test_a_link_to_a_plain_file_is_one(tmp_path, cli):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    (tmp_path / "link").symlink_to("text")
    (tmp_path / "open").symlink_to("/proc/self/fd")
    with open(tmp_path / "text", "rb") as file:
        for path in (tmp_path / "link", tmp_path / "open" / str(file.fileno())):
            with open_plain(path) as plain:
                assert plain.read().decode() == TEXT
