"""Weights in fewer bits: what rounding may change, what it may not, and the loss on real text."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import NARROW, SMALL, needs_clang, randomize, weights_of
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, InputError
from tinygpt.checkpoints.quantization import (
    convert,
    dtype_of,
    matrices,
    set_weight,
    supported,
    widened,
)
from tinygpt.checkpoints.safetensors_file import read_header, write
from tinygpt.checkpoints.stored_tensor import read_tensor
from tinygpt.errors import CheckpointError
from tinygpt.runtime import device
from tinygpt.study.reference import Reference

README = Path(__file__).parents[2] / "README.md"
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)
# The largest error of a weight: half a unit in the last of 11 or 8 bits, or half a step of 127.
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}


def held_in(dtype: str, **options: object) -> GPT:
    return convert(randomize(GPT(replace(SMALL, **options))), dtype)


def reference_of(model: GPT) -> Reference:
    wide = {f"{name}.weight": widened(layer) for name, layer in matrices(model).items()}
    return Reference(model.config, {**weights_of(model), **wide})


@pytest.mark.backend
@pytest.mark.parametrize("dtype", NARROW)
def test_a_model_in_fewer_bits_computes_what_its_rounded_weights_say(dtype):
    for options in ({}, {"tie_word_embeddings": False, "norm": "post"}):
        model = held_in(dtype, **options)
        logits = model(Tensor(TOKENS)).numpy()
        assert np.abs(logits - reference_of(model)(TOKENS)).max() < 1e-4


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_to_the_nearest(dtype):
    wide, model = randomize(GPT(SMALL)), held_in(dtype)
    for name, layer in matrices(model).items():
        true = widened(matrices(wide)[name])
        reach = np.abs(true).max(1, keepdims=True) if dtype == "int8" else np.abs(true)
        assert (np.abs(widened(layer) - true) <= reach * ROUNDING[dtype] * 1.0001).all()
        assert dtype_of(layer) == dtype


def test_all_but_the_matrices_stays_float32():
    model = held_in("int8")
    narrow = {name for name, tensor in get_state_dict(model).items() if tensor.dtype.itemsize == 1}
    assert narrow == {f"{name}.weight" for name in matrices(model)}
    both = {f"{name}.{part}" for name in matrices(model) for part in ("weight", "scale")}
    assert {n for n, t in get_state_dict(model).items() if t.ndim == 2} - both == {"wpe.weight"}


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_what_is_saved_is_loaded_as_such(dtype, tmp_path):
    model = held_in(dtype, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = weights_of(GPT.from_pretrained(tmp_path))
    assert again.keys() == weights_of(model).keys()
    for name, value in weights_of(model).items():
        assert np.array_equal(again[name], value), name
        assert again[name].dtype == value.dtype
    wide = GPT.from_pretrained(tmp_path, "float32")
    for name, layer in matrices(wide).items():
        assert np.array_equal(widened(layer), widened(matrices(model)[name])), name
    stored = {info.dtype for info in read_header(tmp_path / "model.safetensors")[0].values()}
    assert stored == {
        "F32",
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(dtype, "I8"),
    }


def test_a_backend_without_a_dtype_widens_what_is_stored_and_refuses_what_is_asked(
    tmp_path, monkeypatch
):
    model = held_in("bfloat16")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("tinygpt.checkpoints.quantization.supported", lambda _: False)
    monkeypatch.setattr("tinygpt.checkpoints.load_weights.supported", lambda _: False)
    wide = GPT.from_pretrained(tmp_path)
    assert dtype_of(wide.wte) == "float32"
    assert np.array_equal(widened(wide.wte), widened(model.wte))
    with pytest.raises(InputError, match="does not work with float16: choose float32"):
        GPT.from_pretrained(tmp_path, "float16")


@needs_clang
def test_a_backend_is_asked_once_what_it_can_hold(monkeypatch):
    asked, compiler = [], Device[Device.DEFAULT].compiler
    monkeypatch.setattr(compiler, "compile_cached", asked.append)  # as often as there are tensors
    device._widens_half.cache_clear()
    assert supported("float16")
    assert supported("float16")
    assert len(asked) == 1
    device._widens_half.cache_clear()


@needs_clang
@pytest.mark.skipif(platform.machine() != "x86_64", reason="all others have it")
def test_a_processor_that_cannot_widen_float16_holds_what_is_stored_so_in_float32():
    script = "from tinygpt import *; model = GPT.from_pretrained('shakespeare'); "
    script += "print(model.wte.weight.dtype, [*Generator(model).generate([1], 5, temperature=0)])"
    found = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            cwd=README.parent, env={**os.environ, "DEV": f"CPU::x86_64,{processor}"},
            encoding="utf-8",
        ).stdout.partition(" ")
        for processor in ("native", "x86-64-v2")
    ]  # fmt: skip
    assert found[1][0] == "dtypes.float"
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("float16", 1e5, "lm_head has values too large for float16: choose float32 or bfloat16"),
        ("int8", np.nan, "too large for int8"),
        ("int8", np.inf, "too large for int8"),
    ],
)
def test_values_that_do_not_fit_are_refused(dtype, value, words):
    if not supported(dtype):
        return
    layer = GPT(SMALL, seed=None).wte
    with pytest.raises(InputError, match=words):
        set_weight(layer, np.full((67, 16), value, np.float32), dtype, "lm_head")


def test_what_overflows_on_its_way_is_refused():
    if not supported("bfloat16"):
        return
    layer, largest = GPT(SMALL, seed=None).wte, np.finfo(np.float32).max
    scale = np.full(67, 3e36, np.float32)
    with pytest.raises(InputError, match="wte has values too large for bfloat16"):
        set_weight(layer, np.full((67, 16), largest), "bfloat16", "wte")
    for dtype in ("int8", "float32"):
        with pytest.raises(InputError, match=f"wte has values too large for {dtype}"):
            set_weight(layer, np.full((67, 16), -128, np.int8), dtype, "wte", scale)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="unknown dtype 'int4': allowed are"):
        convert(GPT(SMALL), "int4")


def test_a_row_of_zeros_stays_zeros():
    layer = GPT(SMALL, seed=None).wte
    set_weight(layer, np.zeros((67, 16), np.float32), "int8", "wte")
    assert not widened(layer).any()


@pytest.mark.parametrize("lost", ["transformer.wte.scale", "transformer.h.1.attn.c_attn.scale"])
def test_an_int8_file_without_a_scale_is_refused_by_name(lost, tmp_path):
    held_in("int8").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    header = {name: info for name, info in read_header(path)[0].items() if name != lost}
    arrays = {name: read_tensor(path, info) for name, info in header.items()}
    write(path, {n: (i.dtype, i.shape) for n, i in header.items()}, arrays.__getitem__)
    with pytest.raises(CheckpointError, match=f"missing {lost.removeprefix('transformer.')}"):
        GPT.from_pretrained(tmp_path)


def test_the_loss_on_real_text_moves_by_at_most_half_a_percent(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=4, n_embd=64, n_positions=64, vocab_size=256, bos_token_id=0,
        eos_token_id=0, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)
    theirs = transformers.GPT2LMHeadModel(config)
    data = np.frombuffer(README.read_bytes(), np.uint8).astype(np.int64)  # real text, always here
    optimizer, rng = torch.optim.AdamW(theirs.parameters(), 1e-2), np.random.default_rng(0)
    for _ in range(150):
        rows = rng.integers(0, len(data) - 64, (8, 1)) + np.arange(64)
        batch = torch.tensor(data[rows])
        optimizer.zero_grad()
        theirs(batch, labels=batch).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    batch = data[: 16 * 64].reshape(16, 64)

    def loss(dtype: str) -> float:
        model = GPT.from_pretrained(tmp_path, dtype)
        logits = model(Tensor(batch.astype(np.int32)))[:, :-1]
        return logits.sparse_categorical_crossentropy(Tensor(batch[:, 1:].astype(np.int32))).item()

    true = theirs.eval()(torch.tensor(batch), labels=torch.tensor(batch)).loss.item()
    assert true < 3.5  # against ln 256 = 5.5: it has learnt something that rounding can harm
    assert abs(loss("float32") / true - 1) < 1e-4
    for dtype in NARROW:
        assert abs(loss(dtype) / true - 1) < 0.005, dtype


@pytest.mark.parametrize("dtype", [name for name in NARROW if name != "int8"])
def test_transformers_reads_what_is_saved_in_fewer_bits(dtype, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = held_in(dtype)
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits = theirs(torch.tensor(TOKENS)).logits.detach().numpy()
    assert np.abs(model(Tensor(TOKENS)).numpy() - logits).max() < 1e-4
