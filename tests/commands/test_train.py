"""The command `train`: its flags, and that its errors speak in them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from prepared import prepared
from program import finish, start

from tinygpt import GPT, InputError, load_tokenizer
from tinygpt.checkpoints.run_folder import checkpoint_in
from tinygpt.commands import train
from tinygpt.commands.main import main
from tinygpt.data.dataset import Dataset
from tinygpt.data.prepare import prepare
from tinygpt.tokenizer.encoding import same_tokenizer
from tinygpt.training.lock import locked


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
        (["--minutes", "nan"], "--minutes is nan: it must be a number, above 0 and at most 527040"),
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
    monkeypatch.setattr(train, "plan", lambda settings, *_: built.append(settings))
    short = "--layers 2 --heads 2 --dim 8 --inner 12 --context 4 --untied"
    long = "--n-layer 2 --n-head 2 --n-embd 8 --n-inner 12 --block-size 4 --no-tie-word-embeddings"
    for flags in (short, long):
        argv = [*flags.split(), "--no-bias", "--no-shortcut", "--norm", "post"]
        with pytest.raises(TypeError):  # there is no plan to follow
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


FAST = ["--steps", "2", "--eval-every", "2", "--eval-batches", "1", "--batch-size", "2"]
SMALL_SHAPE = ["--layers", "1", "--heads", "1", "--dim", "16", "--context", "8"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "refused",
    [
        ["--context", "4000"],  # only the tokens tell that this is too much
        ["--heads", "3"],
        ["--config", "none.toml"],
        ["--tokenizer", "gpt3"],
    ],
)
def test_a_refused_first_try_leaves_nothing_that_blocks_the_second(refused, text, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError):
        command(text, "-o", run, *SMALL_SHAPE, *FAST, *refused)
    assert not run.exists()
    assert command(text, "-o", run, *SMALL_SHAPE, *FAST, "--tokenizer", "bytes") == 0


def test_a_killed_first_try_leaves_nothing_that_blocks_the_second(text, tmp_path, monkeypatch):
    """Its tokens are made anew; those that the user has made are not touched."""
    run = tmp_path / "run"

    def killed(*_):
        raise SystemExit

    argv = [text, "-o", run, *SMALL_SHAPE, *FAST]
    monkeypatch.setattr(train, "_train", killed)
    with pytest.raises(SystemExit):
        command(*argv, "--tokenizer", "char")
    assert (run / "data" / "header.json").is_file()
    monkeypatch.undo()
    assert command(*argv, "--tokenizer", "bytes") == 0
    mine = tmp_path / "mine" / "data"
    prepare(text, mine, "char")
    with pytest.raises(InputError, match="was prepared with tokenizer 'char'"):
        command(text, "-o", tmp_path / "mine", *SMALL_SHAPE, *FAST, "--tokenizer", "bytes")
    assert (mine / "header.json").is_file()


def test_a_run_in_use_is_refused_to_a_second_training(text, tmp_path):
    argv = [text, "-o", tmp_path / "run", *SMALL_SHAPE, *FAST]
    with locked(tmp_path / "run"):
        assert "is in use by another training" in words_of_error(*argv)
        assert "is in use by another training" in words_of_error(*argv, "--resume")
    assert command(*argv) == 0


def test_a_model_brings_its_tokenizer_and_a_rate_for_fine_tuning(text, tmp_path, capsys):
    """And the run's folder is its best checkpoint, here, in `generate` and `evaluate`."""
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other.txt"
    assert command(text, "-o", one, *SMALL_SHAPE, *FAST, "--tokenizer", "bpe:300") == 0
    other.write_text("A lazy fox. Wörter 日本語, and quick dogs! " * 40, encoding="utf-8")
    assert command(other, "-o", two, "--model", one, *FAST) == 0
    assert command(other, "-o", two, "--resume", "--steps", "3") == 0
    tokenizers = [load_tokenizer(run) for run in (one, two)]
    assert same_tokenizer(*tokenizers)
    state = json.loads((checkpoint_in(two, "last") / "state.json").read_text(encoding="utf-8"))
    assert state["config"]["learning_rate"] == 1e-4
    assert state["config"]["steps"] == 3
    assert main(["evaluate", str(two), str(two / "data")]) == 0
    capsys.readouterr()
    assert main(["generate", "quick", "--model", str(two), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("quick")


def test_the_end_of_a_run_is_a_text_on_stdout_and_samples_are_shown_as_text(text, tmp_path, capsys):
    argv = [text, "-o", tmp_path / "run", *SMALL_SHAPE, *FAST, "--sample-tokens", "30"]
    assert command(*argv) == 0
    out, words = capsys.readouterr()
    assert len(out) == 31  # characters, and a line feed
    assert "a sample of 30 tokens:\n" + out in words
    assert f"done: tinygpt generate --model {tmp_path / 'run'}" in words


def test_texts_are_told_from_tokens_and_from_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.txt", "in/b.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("2 times 3 is 6. " * 99, encoding="utf-8")
    tiny = ["--layers", "1", "--heads", "1", "--dim", "8", "--context", "8", "--batch-size", "2"]
    tiny += ["--steps", "2", "--eval-every", "1", "--eval-batches", "1", "--sample-tokens", "1"]
    for out, argv in (
        ("folder", ["in", "--tokenizer", "bytes"]),
        ("files", ["in/b.txt", "in/a.txt", "--val", "0.5"]),
        ("pattern", ["in/*.txt", "--tokenizer", data.folder]),
    ):
        assert command(*argv, "-o", out, *tiny) == 0
        assert command(*argv, "-o", out, "--resume") == 0
    assert Dataset.open("files/data").header.val == 0.5
    assert command("in/b.txt", "in/a.txt", "-o", "files", "--resume") == 0  # as it was read then
    assert same_tokenizer(Dataset.open("pattern/data").tokenizer(), data.tokenizer())
    assert words_of_error("in/a.tx", "-o", "x").startswith("there is no file or folder 'in/a.tx'")
    assert "is a run's folder: its tokens are in files/data" in words_of_error("files", "-o", "x")
    assert "header.json" in words_of_error(Path("in/a.txt").rename("train.bin").parent, "-o", "x")
    assert words_of_error(data.folder, "-o", "x", "--field", "a").startswith(
        "--field is for a text"
    )
    assert words_of_error(data.folder, "-o", "x", "--tokenizer", "char").startswith(
        "--tokenizer is"
    )
