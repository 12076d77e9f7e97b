"""`tinygpt models`: what is on this machine, and removing what was fetched."""

from __future__ import annotations

import pytest
from conftest import randomize, save_with_bytes
from program import CONFIG, is_refused

from tinygpt import GPT


@pytest.fixture
def caches(tmp_path, monkeypatch):
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    monkeypatch.setenv("TINYGPT_CACHE", str(own))
    monkeypatch.setenv("HF_HUB_CACHE", str(theirs))
    model = randomize(GPT(CONFIG))
    save_with_bytes(model, own / "models" / "openai-community--gpt2")
    for name in ("models--some--writer", "models--gpt2", "models--some--bert"):
        save_with_bytes(model, theirs / name / "snapshots" / "abc")
        (theirs / name / "refs").mkdir()
        (theirs / name / "refs" / "main").write_text("abc", encoding="utf-8")
    other = theirs / "models--some--bert" / "snapshots" / "abc" / "config.json"
    other.write_text('{"model_type": "bert"}', encoding="utf-8")
    (own / "models" / ".0123.tmp").mkdir()
    return own / "models", theirs


def test_it_lists_what_a_name_stands_for_with_sizes(cli, caches):
    status, out, err = cli("models")
    assert (status, err) == (0, "")
    lines = [line.split(None, 3) for line in out.splitlines()]
    assert [line[0] for line in lines] == ["tales", "shakespeare", "gpt2", "some/writer"]
    assert [line[3] for line in (*lines[:2], lines[3])] == [
        *["built in"] * 2,
        "Hugging Face's cache",
    ]
    assert lines[2][3].endswith("openai-community--gpt2")
    assert float(lines[0][1]) > float(lines[1][1]) > 5


def test_it_removes_what_was_fetched_and_nothing_else(cli, caches):
    own, theirs = caches
    status, out, _ = cli("models", "--remove", "gpt2")
    assert (status, out) == (0, f"{own / 'openai-community--gpt2'}\n")
    assert [path.name for path in own.iterdir()] == [".0123.tmp"]
    refused = {
        "shakespeare": "a part of the program",
        "gpt2": "is in Hugging Face's cache, which is not ours",
        "some/writer": "is in Hugging Face's cache, which is not ours",
        "none": "no fetched model 'none': `tinygpt models` lists what is here",
        "..": "no fetched model '..'",
        ".0123.tmp": "no fetched model",
        "/etc": "no fetched model '/etc'",
        "": "--remove is empty",
    }
    for name, words in refused.items():
        assert is_refused(cli("models", "--remove", name), words)
    assert (theirs / "models--some--writer" / "snapshots" / "abc" / "config.json").is_file()


def test_a_link_is_removed_and_not_what_it_leads_to(cli, caches, tmp_path):
    own, _ = caches
    elsewhere = tmp_path / "elsewhere"
    (own / "openai-community--gpt2").rename(elsewhere)
    (own / "openai-community--gpt2").symlink_to(elsewhere)
    assert cli("models", "--remove", "gpt2")[0] == 0
    assert (elsewhere / "config.json").is_file()
    assert not (own / "openai-community--gpt2").exists()
