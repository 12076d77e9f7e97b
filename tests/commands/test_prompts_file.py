"""A file of prompts, each continued once, however often the program is started."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import needs_clang, randomize, save_with_bytes
from together import and_one, command, environment, mpirun, needs_mpi, told

from tinygpt import GPT, GPTConfig
from tinygpt.commands import prompts_file
from tinygpt.commands.main import main
from tinygpt.writer import Writer

PROMPTS = [
    {"id": "sea", "prompt": "the sea"},
    {"prompt": "a café, a king " * 5, "more": [1]},
    {"id": 7, "prompt": ""},
    *({"id": f"n{i}", "prompt": "k" * (1 + i % 9) + str(i)} for i in range(20)),
]
FLAGS = ["--temperature", "1", "--seed", "5", "-n", "11", "--stop", "e"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257)
    save_with_bytes(randomize(GPT(config)), folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def alone(model) -> dict[str | int, str]:
    """The text of each prompt by itself, with the next seed."""
    writer, found = Writer.open(str(model)), {}
    for i, asked in enumerate(PROMPTS):
        stream, text = writer.text_stream(["e"]), ""
        ids = writer.encode(asked["prompt"])
        for (token,) in writer.stream(ids, 11, [5 + i], temperature=1.0):
            text += stream.add(token)
            if stream.stopped:
                break
        found[asked.get("id", i + 1)] = text + stream.end()
    return found


def call(model: Path, prompts: Path, out: Path | None, *more: str) -> int:
    argv = ["generate", "--model", model, "--prompts", prompts, *FLAGS, *more]
    return main([*map(str, argv), *([] if out is None else ["--out", str(out)])])


def texts_in(lines: str) -> dict[str | int, str]:
    assert lines.endswith("\n")
    records = [json.loads(line) for line in lines.splitlines()]
    found = {record["id"]: record["text"] for record in records}
    assert len(found) == len(records)
    for record in records:
        assert set(record) == {"id", "text", "finish_reason"}
    return found


def test_each_text_is_what_it_would_be_alone(model, prompts, alone, tmp_path, capsys):
    assert call(model, prompts, tmp_path / "out.jsonl") == 0
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert texts_in(lines) == alone
    finishes = {r["id"]: r["finish_reason"] for r in map(json.loads, lines.splitlines())}
    assert set(finishes.values()) == {"stop", "length"}
    assert "23 texts, " in capsys.readouterr().err
    assert call(model, prompts, None) == 0
    assert texts_in(capsys.readouterr().out) == alone


def test_what_is_there_is_not_written_again_and_a_cut_line_is(
    model, prompts, alone, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    assert call(model, prompts, out) == 0
    lines = out.read_bytes().splitlines(keepends=True)
    for cut in (b"", lines[5][:1], lines[5][:-1], b"\xef\xbb"):
        out.write_bytes(b"".join(lines[:5]) + cut)
        assert call(model, prompts, out) == 0
        assert out.read_bytes().startswith(b"".join(lines[:5]))
        assert texts_in(out.read_text(encoding="utf-8")) == alone
    capsys.readouterr()
    whole = out.read_bytes()
    assert call(model, prompts, out) == 0
    assert out.read_bytes() == whole
    assert "0 texts" in capsys.readouterr().err


def test_no_tokens_are_texts_too(model, prompts, tmp_path):
    assert call(model, prompts, tmp_path / "out.jsonl", "-n", "0") == 0
    found = texts_in((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert set(found.values()) == {""}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: prompt is 3"),
        ('{"text": "a"}', "prompt is None"),
        ('{"prompt": "a", "id": true}', "id is True"),
        ('{"prompt": "a", "id": 1.5}', "id is 1.5"),
        ('{"prompt": "a", "id": null}', "id is None"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2: its id 2 is that of line 1 too"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: "),
        ('{"prompt": ', "line 1: "),
        ('["a"]', "line 1: "),
        ('"\\ud800"', "line 1: "),
        ('{"prompt": "a \\ud83d"}', "line 1: its prompt or id has half of a surrogate pair"),
        ('{"prompt": "a", "id": "\\udc00"}', "line 1: its prompt or id has half of"),
    ],
)
def test_a_bad_line_is_told_by_its_number(given, told, model, tmp_path, capsys):
    (file := tmp_path / "bad.jsonl").write_text(given, encoding="utf-8")
    assert call(model, file, tmp_path / "out.jsonl") == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_what_does_not_go_together_is_refused(model, prompts, tmp_path, capsys):
    for more in (["hi"], ["--ids", "3"], ["-i"], ["--json"], ["--num-samples", "2"]):
        assert call(model, prompts, tmp_path / "out.jsonl", *more) == 2
        assert "is for one prompt: leave it out" in capsys.readouterr().err
    assert main(["generate", "hi", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "--out is for the texts of --prompts" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ('{"id": "sky", "text": ""}\n', "line 1, is no text of a prompt that was given"),
        ('{"id": [1], "text": ""}\n', "line 1, is no text of a prompt that was given"),
        ('{"id": 7, "text": ""}\n' * 2, "line 2: 7 stands there twice"),
        ('{"id": 7, "prompt": "a"}\n', "line 1, is no text of a prompt that was given"),
        ("Once upon a time\n", "line 1: "),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(there, told, model, prompts, tmp_path, capsys):
    (out := tmp_path / "out.jsonl").write_text(there, encoding="utf-8")
    assert call(model, prompts, out) == 2
    assert told in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == there


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_to_write_into_is_refused(model, prompts, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert call(model, prompts, tmp_path / "pipe") == 2
    assert "cannot write" in capsys.readouterr().err


def test_two_programs_do_not_write_one_file(model, prompts, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "out.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert call(model, prompts, tmp_path / "out.jsonl") == 2
    assert "another program is writing" in capsys.readouterr().err


def test_a_full_disk_is_told(model, prompts, alone, tmp_path, capsys, monkeypatch):
    """With the file's name, once; and what is there is gone on with."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(prompts_file, "write_whole", full)
        assert call(model, prompts, out) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert (
        f"cannot write {out}: no space left on device; the same command goes on from here" in line
    )
    assert call(model, prompts, out) == 0
    assert texts_in(out.read_text(encoding="utf-8")) == alone


@needs_mpi
@needs_clang
def test_several_processes_write_the_same_texts(model, prompts, alone, tmp_path):
    """And go on with what one process, or others, have left."""
    out = tmp_path / "out.jsonl"
    argv = ["generate", "--model", model, "--prompts", prompts, *FLAGS]
    for ranks in (3, 2):
        status, _, told = mpirun(ranks, *argv, "--out", out)
        assert (status, told[-1].split(",")[0]) == (0, f"tinygpt: {len(alone)} texts"), told
        assert texts_in(out.read_text(encoding="utf-8")) == alone
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:7]) + lines[7][:9])
        assert call(model, prompts, out) == 0
        assert texts_in(out.read_text(encoding="utf-8")) == alone
        out.unlink()
    status, stdout, _ = mpirun(2, *argv)
    assert status == 0
    assert texts_in(stdout) == alone


@needs_mpi
@needs_clang
def test_processes_with_other_prompts_are_refused(model, prompts, tmp_path):
    (folder := tmp_path / "other").mkdir()
    (folder / "p.jsonl").write_text('{"prompt": "a"}', encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "b"}', encoding="utf-8")
    argv = ["generate", "--model", str(model), "--prompts", "p.jsonl", *FLAGS]
    line = [*command(1, *argv), *and_one(folder, *argv)]
    found = subprocess.run(
        line, cwd=tmp_path, env=environment(), capture_output=True, encoding="utf-8"
    )
    assert found.returncode == 2
    (fault,) = told(found.stderr)
    assert "SHA-256 of the prompts: rank 1 has" in fault


@needs_clang
@pytest.mark.slow
def test_killed_at_any_moment_it_writes_each_text_once(model, prompts, tmp_path):
    """20 times by SIGKILL, SIGTERM and SIGINT; the last start is left to end."""
    draw, cut = random.Random(0), 0
    command = [sys.executable, "-m", "tinygpt", "generate", "--model", model, "--prompts", prompts]
    command = [*map(str, command), "--temperature", "1", "--seed", "5", "-n", "300"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    subprocess.run([*command, "--out", whole], check=True)
    out.write_bytes(b"")
    for _ in range(20):
        # Less than there was, or all would be there after the first few.
        out.write_bytes(out.read_bytes()[: draw.randrange(1 + out.stat().st_size // 2)])
        before = out.stat().st_size
        child = subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE)
        while child.poll() is None and out.stat().st_size <= before:
            pass
        time.sleep(draw.uniform(0.0, 0.03))
        child.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        child.communicate(timeout=120)
        cut += out.stat().st_size < whole.stat().st_size
    assert cut > 5  # the others had ended
    assert subprocess.run([*command, "--out", out], capture_output=True).returncode == 0
    expected = texts_in(whole.read_text(encoding="utf-8"))
    assert texts_in(out.read_text(encoding="utf-8")) == expected
