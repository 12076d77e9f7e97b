"""The command `train`: its flags, and that its errors speak in them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from prepared import prepared
from program import finish, start

from tinygpt import GPT, InputError
from tinygpt.commands import train
from tinygpt.data.dataset import Dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return Dataset.open(prepared(tmp_path_factory.mktemp("data") / "data"))


def command(*argv) -> int:
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    return train.run(parser.parse_args([str(word) for word in argv]))


def words_of_error(*argv) -> str:
    with pytest.raises(InputError) as caught:
        command(*argv)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--context", "0"], "--context is 0: it must be a whole number, 1 or more"),
        (["--block-size", "0"], "--block-size is 0: it must be a whole number, 1 or more"),
        (["--layers", "two"], "--layers is 'two': it must be a whole number"),
        (["--heads=3"], "--n-embd 128 is not divisible by --heads 3"),
        (["--dim", "30", "--n-head", "4"], "--dim 30 is not divisible by --n-head 4"),
        (["--norm", "prre"], "unknown --norm 'prre': did you mean 'pre'?"),
        (["--beta1", "1"], "--beta1 is 1.0: it must be a number, 0 or more and below 1"),
        (["--minutes", "nan"], "--minutes is nan: it must be a finite number, above 0"),
        (["--config", "file.toml"], "n_embd 30 is not divisible by n_head 4"),
        (["--config", "file.toml", "--heads", "4"], "n_embd 30 is not divisible by --heads 4"),
        (["--resume", "--layers", "1"], "--layers cannot change a run"),
    ],
)
def test_an_error_speaks_in_the_words_that_were_typed(argv, words, data, tmp_path, monkeypatch):
    """A flag as it was spelled, what could be a flag by its first spelling, a file's key as one."""
    monkeypatch.chdir(tmp_path)
    Path("file.toml").write_text("n_embd = 30\nn_head = 4\n", encoding="utf-8")
    assert words_of_error(data.folder, "-o", "out", *argv).startswith(words)


def test_each_spelling_of_the_shape_reaches_the_settings(data, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(train, "start", lambda _, __, settings, *___: built.append(settings) or 1)
    short = "--layers 2 --heads 2 --dim 8 --inner 12 --context 4 --untied"
    long = "--n-layer 2 --n-head 2 --n-embd 8 --n-inner 12 --block-size 4 --no-tie-word-embeddings"
    for flags in (short, long):
        argv = [*flags.split(), "--no-bias", "--no-shortcut", "--norm", "post"]
        with pytest.raises(AttributeError):  # there is no run to start
            command(data.folder, "-o", tmp_path / "out", *argv)
    expected = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_inner": 12, "block_size": 4}
    expected |= {"bias": False, "shortcut": False, "tie_word_embeddings": False, "norm": "post"}
    assert built == [expected, expected]


def test_a_model_of_every_shape_option_trains(data, tmp_path):
    shape = {"n_inner": 24, "shortcut": False, "tie_word_embeddings": False}
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}
    settings |= {"steps": 1, "eval_every": 1, "eval_batches": 1, "sample_tokens": 0}
    run = train.start(tmp_path / "run", data, settings | shape)
    assert run.go() is None
    config = GPT.from_pretrained(tmp_path / "run" / "last").config
    assert {name: getattr(config, name) for name in shape} == shape


@pytest.mark.parametrize("encoding", [None, "cp1252"])
def test_a_sample_in_letters_that_the_system_cannot_write_is_no_end(encoding, tmp_path):
    """In the POSIX locale stderr is ASCII, and so would a file be whose encoding is not named."""
    (tmp_path / "text.txt").write_text("Grüße 😀 ж " * 200, encoding="utf-8")
    shape = ["--layers", "1", "--heads", "1", "--dim", "16", "--context", "8", "--batch-size", "2"]
    steps = ["--steps", "2", "--eval-every", "1", "--eval-batches", "1", "--sample-tokens", "40"]
    system = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    system["PYTHONIOENCODING"] = encoding
    argv = ["train", tmp_path / "text.txt", "-o", tmp_path / "run", *shape, *steps]
    status, _, words = finish(start(*argv, env=system))
    assert status == 0, words
    lines = (tmp_path / "run" / "log.jsonl").read_bytes().decode().split("\n")
    assert "ж" in "".join(lines)
    assert "\\u0436" in words or "\\U0001f600" in words  # as the terminal can show them
