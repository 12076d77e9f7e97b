"""GPT-2's own vocabulary, which is known and not proven anew: what is known is true, and anything
that differs from it is still looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinygpt import load_tokenizer
from tinygpt.errors import CheckpointError, InputError
from tinygpt.tokenizer import vocabulary
from tinygpt.tokenizer.encoding import save_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[dict[str, int], list[str]]:
    """GPT-2's vocabulary and merges."""
    folder = tmp_path_factory.mktemp("gpt2")
    try:
        save_tokenizer(load_tokenizer("gpt2"), folder)
    except InputError:
        pytest.skip("GPT-2's vocabulary is neither here nor to be had")
    lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
    return json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8")), lines[1:-1]


def test_what_is_known_of_gpt2_is_what_the_proof_gives(files):
    vocab, merges = files
    known = vocabulary._ranks_of_gpt2(vocab, merges)
    assert known == vocabulary._checked_ranks(vocab, vocab, merges, "gpt2")
    assert known == load_tokenizer("gpt2").encoding._mergeable_ranks


@pytest.mark.parametrize("form", ["pairs", "lines"])
def test_gpt2s_vocabulary_is_not_proven_again(form, files, monkeypatch):
    vocab, merges = files
    monkeypatch.setattr(vocabulary, "_checked_ranks", None)  # which cannot be called
    given = merges if form == "lines" else [merge.split(" ") for merge in merges]
    shuffled = dict(sorted(vocab.items(), key=lambda item: item[0][::-1]))
    more = {**shuffled, "<extra>": 50300}
    found = vocabulary.from_merges(more, given, "gpt2").encoding
    assert found._special_tokens == {"<|endoftext|>": 50256, "<extra>": 50300}
    assert found._mergeable_ranks == load_tokenizer("gpt2").encoding._mergeable_ranks


def _swapped(vocab: dict[str, Any]) -> dict[str, Any]:
    return {**vocab, "the": vocab["he"], "he": vocab["the"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swapped, "ids must rise"),
        (lambda vocab: {**vocab, '"': True}, "has id True, not a whole number"),
        (lambda vocab: {**vocab, "<extra>": 5}, "id 5 is both"),
        (lambda vocab: {**vocab, "<extra>": 50300, "<more>": 50300}, "id 50300 is both"),
        (lambda vocab: {**vocab, "<extra>": -1}, "has id -1, not a whole number"),
        (lambda vocab: {**vocab, "\ud800": 50300}, "in valid Unicode"),
        (lambda vocab: {k: v for k, v in vocab.items() if k != "the"}, "make a known third"),
        (lambda vocab: list(vocab), "must be an object and a list"),
    ],
)
def test_a_vocabulary_that_only_looks_like_gpt2s_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str, files
):
    vocab, merges = files
    with pytest.raises(CheckpointError, match=words):
        vocabulary.from_merges(change(vocab), merges, "gpt2")


def test_merges_that_only_look_like_gpt2s_are_refused(files):
    vocab, merges = files
    longer = [*merges[0].split(" "), "x"]
    for number, bad in ((0, [merges[0]]), (0, longer), (0, 5), (9, ["a", 5]), (9, "a b c")):
        changed = [*merges[:number], bad, *merges[number + 1 :]]
        with pytest.raises(CheckpointError, match="tokenizer 'gpt2': "):
            vocabulary.from_merges(vocab, changed, "gpt2")


def test_tokens_are_too_long_from_8_000_001_steps_on():
    letters = [bytes([byte]) for byte in range(16)]
    tokens = [*letters, b"a" * 49, b"b" * 2828]  # 16 + 49**2 + 2828**2 steps
    for first, words in ((0, "its tokens are too long"), (1, "no merge of two earlier tokens")):
        ranks = {token: number for number, token in enumerate(tokens[first:])}
        with pytest.raises(CheckpointError, match=words):
            vocabulary.find_merges(ranks, "own")
