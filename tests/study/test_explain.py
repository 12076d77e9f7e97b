"""What `explain` says of each operation: parameters exactly, work as tinygrad counts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_clang, randomize, reference_of
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters

import tinygpt
from tinygpt import GPT, GPTConfig, InputError, Record
from tinygpt.study.explain import explain, similarity

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=97)
OPTIONS = [
    {},
    {"norm": "post", "activation": "relu", "bias": False, "tie_word_embeddings": False},
    {"shortcut": False, "activation": "gelu", "position": "sinusoidal"},
]


@needs_clang  # tinygrad counts no work of what its own assembler makes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_totals_are_the_models_and_tinygrads(options, monkeypatch):
    monkeypatch.setenv("TINYGPT_KERNELS", "0")
    model = randomize(GPT(replace(CONFIG, **options)))
    ids = np.random.default_rng(0).integers(0, 97, 32).tolist()
    found = explain(model, ids)
    assert found.parameters == model.config.parameter_count
    assert found.parameters == sum(each.parameters for each in found.operations)
    record = Record()
    logits = model([ids], record=record)
    GlobalCounters.reset()
    Tensor.realize(logits, *record.attention_weights)
    assert found.flops == pytest.approx(GlobalCounters.global_ops, rel=0.02)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_open_block_shows_the_models_own_options_and_numbers(options):
    model = randomize(GPT(replace(CONFIG, **options)))
    ids = [5, 7, 9, 11]
    found = explain(model, ids, block=1)
    names = [each.name for each in found.operations]
    norms = [name for name in names if "ln_" in name]
    inside = ["attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.heads", "attn.out_proj"]
    inside = [*inside, "ln", "mlp.c_fc", f"mlp.{model.config.activation}", "mlp.c_proj"]
    opened = [name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1")]
    if model.config.norm == "post":
        assert opened == [*inside[:5], "ln_1", *inside[6:], "ln_2"]
        assert "ln_f" not in norms
    else:
        assert opened == ["ln_1", *inside[:5], "ln_2", *inside[6:]]
        assert names[-2] == "ln_f"
    assert ("wpe" in names) == (model.config.position == "learned")
    by_name = {each.name: each for each in found.operations}
    assert ("residual" in by_name["blocks.1.mlp.c_proj"].formula) == model.config.shortcut
    assert ("+ b" in by_name["blocks.1.mlp.c_proj"].formula) == model.config.bias
    logits = reference_of(model).row(np.array(ids))
    last = by_name["logits"]
    assert (last.given, last.gives) == ((4, 64), (4, 97))
    assert last.rms == pytest.approx(np.sqrt((logits**2).mean()), rel=1e-4)
    assert (last.lowest, last.highest) == pytest.approx((logits.min(), logits.max()), abs=1e-3)
    whole = {each.name: each for each in explain(model, ids).operations}
    assert [name for name in whole if name.startswith("blocks")] == ["blocks.0", "blocks.1"]
    parts = [each for each in found.operations if each.name.startswith("blocks.1.")]
    assert whole["blocks.1"].flops == sum(each.flops for each in parts)
    assert whole["blocks.1"].rms == parts[-1].rms
    for each in found.operations:
        file, line = each.source.split(":")
        text = (Path(tinygpt.__file__).parent / file).read_text(encoding="utf-8").splitlines()
        assert text[int(line) - 1].lstrip().startswith(("def ", "class ", "@"))


def test_similarity_is_the_mean_cosine_of_pairs():
    vectors = np.random.default_rng(0).normal(size=(5, 7))
    cosines = [
        vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert similarity(vectors) == pytest.approx(np.mean(cosines))
    assert np.isnan(similarity(vectors[:1]))


def test_a_block_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="block is 2: it must be from 0 to 1"):
        explain(GPT(CONFIG), [1], block=2)
    with pytest.raises(InputError, match="the text is empty"):
        explain(GPT(CONFIG), [])
    model = GPT(CONFIG)
    model.ln_f.weight.assign(Tensor.full((64,), 3e38)).realize()
    with pytest.raises(InputError, match="logits are not finite numbers"):
        explain(model, [1, 2])
