"""The command `doctor`: what it says of a machine, and that it tells a backend that is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
from html import escape

import numpy as np
import pytest
from conftest import randomize, reference_of, save_with_bytes
from program import is_refused

from tinygpt import GPT, GPTConfig, __version__
from tinygpt.checkpoints.quantization import convert
from tinygpt.commands import doctor
from tinygpt.runtime import clang, device, memory
from tinygpt.study.reference import Reference


def test_the_doctor_shows_the_machine_and_what_it_lacks(cli, monkeypatch):
    monkeypatch.setattr(clang, "command", lambda: None)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 10**9)
    status, out, _ = cli("doctor")
    assert status == 0
    rows = "tinygpt with python cores memory DEV clang operations steps models kernels vocabulary "
    rows += "device advice"
    assert {line[:13].strip() for line in out.splitlines()} == set(rows.split())
    assert f"tinygpt      {__version__}\n" in out
    assert re.search(r"^device +\w+: found, ", out, re.MULTILINE)
    assert re.search("^advice +`pip install .* brings a clang", out, re.MULTILINE)
    assert "advice       free some memory" in out


PROOFS = [
    "plain tensors = NumPy's reference", "with a cache, in pieces = at once", "in a batch = alone",
    "the lens behind the last block = the logits",
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"norm": "post"}, {"shortcut": False}], ids=str)
@pytest.mark.parametrize("text", [["ab é"], ["x"], []], ids=str)
def test_every_way_to_compute_a_model_is_compared(options, text, tmp_path, cli):
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=257, **options)
    save_with_bytes(randomize(GPT(config)), tmp_path)
    status, out, err = cli("doctor", "--prove", tmp_path, *text)
    assert (status, err) == (0, "")
    claims = [line.partition("  ")[0] for line in out.splitlines() if "  holds  " in line]
    expected = PROOFS + ["the parts of a logit sum to it"] * (not options)
    assert all(any(claim.startswith(each) for claim in claims) for each in expected)
    assert ("operations in C = plain tensors" in claims) == (device.renderer("CPU") == "ClangJIT")
    assert len(claims) == len(expected) + ("operations in C = plain tensors" in claims)
    assert ("no sum of its parts" in out.replace("\n", " ")) == bool(options)
    found = json.loads(cli("doctor", "--prove", tmp_path, *text, "--json")[1])
    assert [each["claim"] for each in found] == claims
    assert all(each["holds"] for each in found)


def test_a_way_that_gives_something_else_is_told(tmp_path, cli, monkeypatch):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=257)
    save_with_bytes(randomize(GPT(config)), tmp_path)
    row = Reference.row
    monkeypatch.setattr(Reference, "row", lambda self, ids: row(self, ids) * 1.001)
    status, out, _ = cli("doctor", "--prove", tmp_path, "abc")
    assert status == 1
    assert out.count("DOES NOT HOLD") == 1
    assert "reference in float64" in next(x for x in out.splitlines() if "NOT" in x)


def test_the_proofs_are_a_page_and_json_too_and_nothing_else_is(tmp_path, cli):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=257)
    save_with_bytes(randomize(GPT(config)), tmp_path)
    page = tmp_path / "proofs.html"
    status, out, _ = cli("doctor", "--prove", tmp_path, "a<b", "--json", "--html", page)
    found = json.loads(out)
    assert status == 0
    assert all(each["holds"] and each["difference"] >= 0 for each in found)
    html = page.read_text(encoding="utf-8")
    assert all(escape(each["claim"]) in html for each in found)
    assert "and the text: a&lt;b" in html
    for flag in (["--html", page], ["--json"]):
        assert is_refused(cli("doctor", *flag), "show what --prove finds: name a model by it")


def test_a_model_without_a_tokenizer_is_proved_with_the_one_that_its_error_offers(tmp_path, cli):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=300)
    randomize(GPT(config)).save_pretrained(tmp_path)
    assert is_refused(cli("doctor", "--prove", tmp_path, "abc"), "pass --tokenizer with")
    assert cli("doctor", "--prove", tmp_path, "abc", "--tokenizer", "bytes")[0] == 0
    assert is_refused(cli("doctor", "--tokenizer", "bytes"), "--tokenizer is for doctor --prove")


@pytest.mark.slow
def test_a_proof_is_of_what_is_on_stdin_and_of_narrow_weights_made_wide(tmp_path, cli, monkeypatch):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=257)
    save_with_bytes(convert(randomize(GPT(config)), "int8"), tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the sea\n")))
    page = tmp_path / "page.html"
    status, out, err = cli("doctor", "--prove", tmp_path, "-", "--html", page, "--json")
    assert status == 0
    assert "its weights are int8: looked at as float32" in err
    assert out == cli("doctor", "--prove", tmp_path, "the sea", "--json")[1]
    assert "in a batch = alone" in page.read_text(encoding="utf-8")
    assert is_refused(cli("doctor", "--prove", tmp_path, ""), "the prompt is empty")
    assert is_refused(cli("doctor", "--json"), "name a model by it")


def test_the_doctor_finds_this_backend_right(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_targets", lambda _: [os.environ.get("DEV") or "CPU"])
    monkeypatch.chdir(tmp_path)
    status, out, _ = cli("doctor", "--backends")
    assert status == 0
    assert re.search(r"\nbackend +\S+: right, largest error of a logit \S+, \d+ tokens/s", out)


@pytest.mark.parametrize("other", [["--prove", "shakespeare"], ["some-run"]])
def test_backends_are_not_passed_over_beside_another_question(cli, other):
    assert is_refused(cli("doctor", "--backends", *other), "leave out --prove and the run")


@pytest.mark.parametrize("stdout", ['{"error": 0.5, "tokens_per_s": 9}', ""])
def test_the_doctor_tells_a_backend_that_is_wrong_or_broken(cli, monkeypatch, stdout):
    result = subprocess.CompletedProcess([], 1, stdout, "a\nit broke\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)
    monkeypatch.setattr(doctor, "_targets", lambda _: ["CPU"])
    monkeypatch.setattr(doctor, "_clang", lambda: "")
    status, out, _ = cli("doctor", "--backends")
    assert status == 1
    assert ("CPU: WRONG" if stdout else "CPU: does not run here (it broke)") in out


@pytest.mark.backend
def test_the_doctors_numbers_are_the_references(capsys):
    expected = reference_of(doctor.toy())([doctor.PROMPT])[0, -1]
    np.testing.assert_allclose(doctor.LOGITS, expected, atol=1e-5)
    doctor.probe()
    assert json.loads(capsys.readouterr().out)["error"] < doctor.TOLERANCE
