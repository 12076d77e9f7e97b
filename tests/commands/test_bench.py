"""The benchmark: that all do the same work, that its arithmetic is right, that one may fail."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize, reference_of, weights_of
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, GPTConfig
from tinygpt.checkpoints.save_gguf import GGUF_TYPES, save_gguf
from tinygpt.commands import bench, peers
from tinygpt.errors import InputError

# 32 is what Q8_0 divides a row into; 257 ids are those of the built-in byte tokenizer.
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257)
PROMPTS = [[5, 200, 31, 7], [90, 3, 3, 250]]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return randomize(GPT(TINY))


@pytest.fixture(scope="module")
def folder(gpt, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model"
    gpt.save_pretrained(path)
    return path


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    reference, ids = reference_of(model), list(prompt)
    for _ in range(count):
        ids.append(int(reference.row(np.array(ids))[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tinygpt", "transformers", "llama.cpp"])
def test_every_contender_makes_the_same_tokens(gpt, folder, family):
    packages = {"transformers": ("torch", "transformers"), "llama.cpp": ("llama_cpp",)}
    for package in packages.get(family, ()):
        pytest.importorskip(package)
    contender = peers.Contender(family, "float32", folder, threads=1)
    try:
        alone, both = contender.ask(PROMPTS[:1], 1), contender.ask(PROMPTS, 3)
    finally:
        contender.close()
    want = [greedy(gpt, prompt, 3) for prompt in PROMPTS]
    assert alone["tokens"] == [[want[0][0]]]
    assert np.transpose(both["tokens"]).tolist() == want  # a row for each step
    assert both["first_s"] > 0
    assert both["rest_s"] > alone["rest_s"] >= 0
    assert both["peak_memory_bytes"] >= 4 * TINY.parameter_count


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_gguf_holds_the_model(gpt, tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "gguf"
    save_gguf(gpt, path, dtype=dtype)
    reader = gguf.GGUFReader(path)
    stored = {t.name: t for t in reader.tensors}
    names = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
    known = {gguf.TENSOR_NAMES[name].format(bid=bid) for name in names for bid in range(2)}
    assert {name.rpartition(".")[0] for name in stored} == known - {"output"}  # it is tied
    ours = weights_of(gpt)
    qkv = np.concatenate([ours[f"blocks.1.attn.{part}_proj.weight"] for part in "qkv"])
    pairs = {
        "token_embd.weight": ours["wte.weight"],
        "blk.1.attn_qkv.weight": qkv,
        "blk.0.ffn_down.weight": ours["blocks.0.mlp.c_proj.weight"],
        "blk.0.ffn_norm.bias": ours["blocks.0.ln_2.bias"],
    }
    for name, want in pairs.items():
        tensor = stored[name]
        full = want.ndim == 1
        assert tensor.tensor_type.name == ("F32" if full else GGUF_TYPES[dtype])
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        error = {"F32": 0, "F16": 2**-11, "Q8_0": 0.6 / 127}[tensor.tensor_type.name]
        assert np.abs(found - want).max() <= error * np.abs(want).max()


def test_gguf_of_another_model_is_refused(tmp_path):
    model = GPT(GPTConfig(1, 1, 32, 8, 8, norm="post"))
    with pytest.raises(InputError, match="norm is 'post'"):
        save_gguf(model, tmp_path / "gguf")


def test_a_contender_that_dies_says_why(tmp_path):
    contender = peers.Contender("tinygpt", "float32", tmp_path / "nowhere", threads=1)
    with pytest.raises(RuntimeError, match="nowhere"):
        contender.ask(PROMPTS, 1)
    contender.close()


class Scripted:
    """A contender of a known speed; it dies at its `last` request."""

    def __init__(self, family: str, dtype: str, step_s: float, last: int = 99) -> None:
        self.name, self.family, self.dtype = f"{family} {dtype}", family, dtype
        self.step_s, self.last = step_s, last
        self.requests: list[tuple[int, int]] = []

    def ask(self, prompts, count):
        self.requests.append((len(prompts), count))
        if len(self.requests) == self.last:
            raise RuntimeError("out of\nbreath")
        times = {"first_s": len(prompts[0]) * self.step_s, "rest_s": (count - 1) * self.step_s}
        return {**times, "tokens": [], "peak_memory_bytes": 1000 * len(self.requests)}


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(bench, "_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "_MATMUL_SIZES", (64,))


def test_one_that_fails_does_not_end_the_rest(small_machine):
    good, bad = Scripted("tinygpt", "float32", 0.5), Scripted("llama.cpp", "int8", 1, last=3)
    works, failures = bench.WORKS[:2], {}
    replies, machine = bench.take_turns([bad, good], works, 2, 257, failures)
    assert failures == {"llama.cpp int8": "out of breath"}
    assert good.requests == [(1, 49), (8, 33)] * 3
    assert len(bad.requests) == 3
    assert [len(replies[good.name][work]) for work in works] == [2, 2]  # the warm-up is left out
    assert min(machine.values()) > 0


def test_summary_is_what_the_numbers_say():
    decode, batch, prefill = bench.WORKS[:3]
    machine = {"gb_per_s": 0.01, "gflop_per_s": 2.0}
    answer = {"first_s": 0.5, "peak_memory_bytes": 7}
    replies = {
        decode: [{**answer, "rest_s": 48 * s} for s in (0.1, 0.4, 0.2)],
        batch: [{**answer, "rest_s": 32 * 0.5}],
        prefill: [{**answer, "rest_s": 0.0}],
    }
    ours = bench.summarize(Scripted("tinygpt", "float16", 0), replies, TINY, machine)
    assert ours["works"]["decode"]["median_s"] == pytest.approx(0.2)
    assert ours["works"]["decode"]["tokens_per_s"] == pytest.approx(5)
    assert ours["works"]["decode of 8"]["tokens_per_s"] == pytest.approx(16)
    assert ours["works"]["prefill of 64"]["tokens_per_s"] == pytest.approx(128)
    assert ours["peak_memory_bytes"] == 7
    parameters = get_state_dict(GPT(TINY, seed=None))
    read = sum(p.numel() for name, p in parameters.items() if name != "wpe.weight")
    assert ours["gb_per_s"] == pytest.approx(2 * read / 0.2 / 1e9)
    assert ours["gb_per_s_share"] == pytest.approx(ours["gb_per_s"] / 0.01)
    matrices = {n: p.numel() for n, p in parameters.items() if p.ndim == 2 and "blocks" in n}
    flops = 2 * 64 * sum(matrices.values()) + 2 * 257 * 32 + 2 * (2 * 64 * 64 * 32)
    of_one = [n for n in matrices if "blocks.1" in n and "k_proj" not in n and "v_proj" not in n]
    flops -= 2 * 63 * sum(matrices[n] for n in of_one)  # in the last block 63 tokens end here
    flops -= 2 * 64 * 64 * 32 - 2 * (2 * 64 * 32)
    assert ours["gflop_per_s"] == pytest.approx(flops / 0.5 / 1e9)
    q8_0 = bench.summarize(Scripted("llama.cpp", "int8", 0), replies, TINY, machine)
    assert q8_0["gb_per_s"] == pytest.approx(34 / 32 / 2 * ours["gb_per_s"])


def test_ratios_say_how_many_times_as_fast():
    times = {
        "tinygpt float32": 0.5,
        "tinygpt int8": 0.1,
        "transformers float32": 1.0,
        "llama.cpp float32": 0.25,
        "llama.cpp int8": 0.2,
    }
    results = {name: {"works": {"decode": {"median_s": s}}} for name, s in times.items()}
    assert bench.compare(results) == {
        "tinygpt float32": {
            "transformers float32": {"decode": 2.0},
            "llama.cpp float32": {"decode": 0.5},
        },
        "tinygpt int8": {
            "transformers float32": {"decode": 10.0},
            "llama.cpp int8": {"decode": 2.0},
        },
    }


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.slow
def test_the_command_prints_tables_and_then_json(folder, small_machine, monkeypatch, capsys):
    args = arguments("--model", str(folder), "--dtype", "float32", "--rounds", "1")
    assert bench.run(args) == 0
    text, line = capsys.readouterr().out.rsplit("\n\n", 1)
    result = json.loads(line)
    assert result["failures"] == result["ratios"]["tinygpt float32"] == {}
    assert {"cpu", "threads", "rounds", "model", "packages"} <= result["conditions"].keys()
    assert min(*result["first_token"].values(), *result["machine"].values()) > 0
    ours = result["results"]["tinygpt float32"]
    assert list(ours["works"]) == ["decode", "decode of 8", "prefill of 64"]  # what fits in 64
    speed = f"{ours['works']['decode']['tokens_per_s']:.1f}"
    assert speed in next(x for x in text.split("\n") if x.startswith("tinygpt float32"))

    result["failures"] = {"tinygpt int8": "no"}
    monkeypatch.setattr(bench, "measure", lambda *_: result)
    assert bench.run(arguments("--json", "--model", str(folder))) == 1
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize("argv", [("--rounds", "0"), ("--dtype", "int7")])
def test_wrong_flags_are_told(argv):
    with pytest.raises(InputError, match=argv[1]):
        bench.run(arguments(*argv))
