"""nanoGPT's models of characters: `meta.pkl` is read as data, and gives each its id."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import writers

from tinygpt import load_tokenizer
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.errors import CheckpointError, InputError
from tinygpt.tokenizer.encoding import encode, same_tokenizer

LETTERS = [chr(0x21 + n) for n in range(writers.SHAPE["vocab_size"])]  # of one and of two bytes


def meta(characters: list[str], **changes: Any) -> dict[str, Any]:
    ids = {character: number for number, character in enumerate(characters)}
    back = dict(enumerate(characters))
    return {"vocab_size": len(characters), "itos": back, "stoi": ids} | changes


def put(path: Path, content: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """nanoGPT's checkpoint and nothing beside it."""
    (tmp_path / "out").mkdir()
    return writers.nanogpt(tmp_path / "out")[0]


@pytest.mark.parametrize("order", ["sorted", "as they came"])
@pytest.mark.parametrize("protocol", range(6))
def test_ids_are_as_meta_pkl_says(protocol, order, tmp_path):
    characters = sorted("To be, ä 中 😀\n") if order == "sorted" else [*dict.fromkeys("zyx ä中a😀")]
    characters = [*dict.fromkeys(characters)]
    tokenizer = load_tokenizer(put(tmp_path / "meta.pkl", meta(characters), protocol))
    text = "".join(reversed(characters))
    assert encode(tokenizer, text) == [*reversed(range(len(characters)))]
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert same_tokenizer(load_tokenizer(tmp_path), tokenizer)  # and the folder means the file


def test_the_file_beside_a_model_is_its_tokenizer(model, cli):
    put(model.parent / "meta.pkl", meta(LETTERS))
    for name in (model, model.parent):
        status, out, err = cli(
            "generate", "To", "--model", name, "--max-new-tokens", 12, "--temperature", 0
        )
        assert status == 0, err
        assert out.startswith("To")
        assert set(out) <= {*LETTERS, "\n"}
        assert len(out.rstrip("\n")) == 2 + 12
    with pytest.raises(InputError, match=r"character ' ' \(U\+0020\) is not in tokenizer"):
        encode(open_checkpoint(model).tokenizer(), "To be")


def test_the_file_may_be_named(model, tmp_path, cli):
    (tmp_path / "data").mkdir()
    path = put(tmp_path / "data" / "meta.pkl", meta(LETTERS))
    for name in (path, path.parent, path.with_name("mine.pkl")):
        if not name.exists():  # and the last one is the same file by another name
            path.rename(name)
        argv = ("generate", "To", "--model", model, "--max-new-tokens", 4, "--tokenizer", name)
        status, out, err = cli(*argv)
        assert status == 0, err
        assert out.startswith("To")
    status, _, err = cli("generate", "To", "--model", model, "--max-new-tokens", 4)
    assert status == 2
    assert "meta.pkl" in err  # what it lacks


def test_a_folders_own_tokenizer_goes_before_meta_pkl(tmp_path):
    put(tmp_path / "meta.pkl", meta(LETTERS))
    own = json.dumps({"kind": "bytes"})
    (tmp_path / "tinygpt_tokenizer.json").write_text(own, encoding="utf-8")
    assert same_tokenizer(load_tokenizer(tmp_path), load_tokenizer("bytes"))


def test_convert_keeps_the_characters(model, tmp_path, cli):
    shuffled = [*reversed(LETTERS)]
    put(model.parent / "meta.pkl", meta(shuffled))
    status, _, err = cli("convert", model, tmp_path / "hf", "--to", "hf")
    assert status == 0, err
    before, after = (open_checkpoint(path).tokenizer() for path in (model, tmp_path / "hf"))
    assert same_tokenizer(before, after)
    assert encode(after, shuffled[0] + shuffled[7]) == [0, 7]


class Runs:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


FAULTS: dict[str, tuple[bytes, str]] = {
    "a call": (pickle.dumps(meta(LETTERS, x=Runs())), "its pickle calls <posix.mkdir>"),
    "an object": (pickle.dumps(Runs, 4), "it has no stoi"),
    "no dict": (pickle.dumps([1]), "it has no stoi"),
    "no stoi": (pickle.dumps({"vocab_size": 65}), "it has no stoi, a dict"),
    "stoi of no kind": (pickle.dumps(meta(LETTERS, stoi=[1])), "it has no stoi"),
    "a word": (pickle.dumps(meta(["the"])), "its stoi has 'the' as 0: only characters"),
    "a number": (pickle.dumps(meta([1])), "its stoi has 1 as 0"),
    "no id": (pickle.dumps(meta(["a"], stoi={"a": "0"})), "its stoi has 'a' as '0'"),
    "a truth": (pickle.dumps(meta(["a"], stoi={"a": False})), "its stoi has 'a' as False"),
    "a gap": (pickle.dumps(meta(["a"], stoi={"a": 0, "b": 2})), "the ids in its stoi are not 0"),
    "an id twice": (pickle.dumps(meta(["a"], stoi={"a": 0, "b": 0})), "ids in its stoi are not 0"),
    "an itos of its own": (pickle.dumps(meta([*"ab"], itos={0: "b", 1: "a"})), "itos and its stoi"),
    "nothing in it": (pickle.dumps(meta([])), "there are 0 characters"),
    "half of a pair": (b"\x80\x04}\x8c\x04stoi}\x8c\x03\xed\xa0\x80K\x00ss.", "not UTF-8"),
    "cut": (pickle.dumps(meta(LETTERS))[:-9], "is cut"),
    "empty": (b"", "is cut"),
    "long": (bytes(2 << 20), "it has more than 1 MiB"),
    "a text": (b"To be", "plain data and tensors do not need"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_hostile_meta_pkl_is_refused_in_one_line_and_runs_nothing(kind, tmp_path, monkeypatch):
    data, words = FAULTS[kind]
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(data)
    for name in ("meta.pkl", "."):
        with pytest.raises(CheckpointError, match=words) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
    assert os.listdir() == ["meta.pkl"]
