"""GGUF's vocabularies as its metadata have them, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinygpt.checkpoints.gguf_vocabulary import (
    ids_of_metadata,
    metadata_of_tokenizer,
    tokenizer_from_metadata,
)
from tinygpt.errors import CheckpointError
from tinygpt.tokenizer.vocabulary import from_merges

PATH = Path("x.gguf")
KEY = "tokenizer.ggml."


def metadata(tokens: list[str], **more: object) -> dict[str, object]:
    return {
        f"{KEY}{name}": value for name, value in {"model": "gpt2", "tokens": tokens}.items()
    } | {f"{KEY}{name}": value for name, value in more.items()}


def test_kinds_of_tokens_are_those_of_the_specification():
    kinds = np.array([1, 1, 1, 3, 4, 5, 5], np.int32)
    tokens = ["a", "b", "ab", "<s>", "<user>", "x", "x"]
    found = tokenizer_from_metadata(metadata(tokens, merges=["a b"], token_type=kinds), PATH)
    assert found.ranks == {b"a": 0, b"b": 1, b"ab": 2}
    assert found.others == {"<s>": 3, "<user>": 4}  # what is not used is not there
    flags = {each.content: (each.id, each.special, each.normalized) for each in found.added}
    assert flags == {"<s>": (3, True, False), "<user>": (4, False, True)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({f"{KEY}tokens": ["a", "b", "a"]}, "its token 'a' is there twice"),
        ({"tinygpt.tokenizer_config": "{"}, "its tinygpt.tokenizer_config: "),
        ({"tinygpt.generation_config": "[1]"}, "its tinygpt.generation_config: "),
    ],
)
def test_what_is_damaged_is_told(changed, words):
    with pytest.raises(CheckpointError, match=f"^x.gguf: {words}"):
        tokenizer_from_metadata(metadata(["a", "b"]) | changed, PATH)
    if f"{KEY}tokens" not in changed:
        with pytest.raises(CheckpointError, match=f"^x.gguf: {words}"):
            ids_of_metadata(changed, PATH)


@pytest.mark.parametrize(
    ("ids", "begins", "ends"),
    [
        ({}, {}, None),
        ({"eos": 7}, {}, 7),
        ({"eot": 8}, {}, 8),
        ({"eos": 7, "eot": 8, "eom": 9, "bos": 3, "padding": 4}, {"bos": 3, "pad": 4}, [7, 8, 9]),
        ({"eos": True, "bos": 1.0}, {}, None),
    ],
)
def test_ids_of_begin_and_end(ids, begins, ends):
    found = ids_of_metadata({f"{KEY}{name}_token_id": number for name, number in ids.items()}, PATH)
    begins = {f"{name}_token_id": number for name, number in begins.items()}
    assert found == {"config.json": {"eos_token_id": ends} | begins}


def test_more_ends_than_gguf_has_are_told(capsys):
    plain = from_merges({"a": 0, "b": 1, "ab": 2}, ["a b"], "test")
    says = {"generation_config.json": {"eos_token_id": [0, 1, 2, 3, 1]}}
    found = metadata_of_tokenizer(replace(plain, kept=says), 3)
    assert [found[f"{KEY}{name}_token_id"] for name in ("eos", "eot", "eom")] == [0, 1, 2]
    assert capsys.readouterr().err == "tinygpt: GGUF has 3 ends at most: 1 is left out\n"
    found = metadata_of_tokenizer(plain, 2)
    assert found[f"{KEY}tokens"] == ["a", "b"]
    assert "'ab' (2) is left out" in capsys.readouterr().err
    found = metadata_of_tokenizer(plain, 4)
    assert found[f"{KEY}tokens"] == ["a", "b", "ab", "[PAD3]"]
    assert found[f"{KEY}token_type"] == [1, 1, 1, 5]


@pytest.mark.parametrize("before", [(), (0,)])
@pytest.mark.parametrize("after", [(), (1,)])
def test_what_stands_around_a_text_is_said(before, after):
    plain = from_merges({"a": 0, "b": 1}, [], "test")
    found = metadata_of_tokenizer(replace(plain, before=before, after=after, bos=0, eos=1), 2)
    assert found[f"{KEY}add_bos_token"] == bool(before)
    assert found.get(f"{KEY}add_eos_token", False) == bool(after)
    ids = {"bos": 0, "eos": 1, "unknown": 1}  # GPT-2's unknown token is its end
    assert {name: found[f"{KEY}{name}_token_id"] for name in ids} == ids
