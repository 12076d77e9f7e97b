"""LoRA adapters over a model: what is loaded is what adding the matrices up in NumPy gives.

`peft` itself was compared by hand; the files here have its names and shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, randomize, save_with_bytes, weights_of
from tinygrad import Tensor

from tinygpt import GPT, InputError, load_tokenizer
from tinygpt.checkpoints import safetensors_file
from tinygpt.checkpoints.open_checkpoint import open_checkpoint
from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.errors import CheckpointError
from tinygpt.study.reference import Reference
from tinygpt.tokenizer.encoding import same_tokenizer

CONFIG = replace(SMALL, n_layer=2, n_inner=24)
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (2, 9))
SETTINGS = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "../base", "r": 4,
    "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "none",
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
}  # fmt: skip
C, INNER, V = CONFIG.n_embd, 24, CONFIG.vocab_size
# What peft may be told to change: its name for it -> ours, and how many rows and columns.
MODULES = {
    "transformer.h.0.attn.c_attn": ("blocks.0.attn.{}_proj", 3 * C, C),
    "transformer.h.1.attn.c_attn": ("blocks.1.attn.{}_proj", 3 * C, C),
    "transformer.h.1.attn.c_proj": ("blocks.1.attn.out_proj", C, C),
    "transformer.h.0.mlp.c_fc": ("blocks.0.mlp.c_fc", INNER, C),
    "transformer.h.0.mlp.c_proj": ("blocks.0.mlp.c_proj", C, INNER),
    "lm_head": ("lm_head", V, C),
}
C_ATTN = tuple(MODULES)[:2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, GPT]:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    (model := randomize(GPT(CONFIG))).save_pretrained(folder)
    return folder, model


def matrices(modules: tuple[str, ...], ranks: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Under the names of peft's file."""
    draw, found = np.random.default_rng(0), {}
    for module in modules:
        _, rows, columns = MODULES[module]
        rank = ranks.get(module, 4)
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            value = draw.normal(0, 0.5, shape).astype(np.float32)
            found[f"base_model.model.{module}.lora_{part}.weight"] = value
    return found


def put(folder: Path, arrays: Mapping[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir()
    content = json.dumps(SETTINGS | settings)
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    kinds = {name: "I32" if value.dtype == np.int32 else "F32" for name, value in arrays.items()}
    layout = {name: (kinds[name], value.shape) for name, value in arrays.items()}
    safetensors_file.write(folder / "adapter_model.safetensors", layout, arrays.__getitem__)
    return folder


def merged(
    model: GPT, arrays: Mapping[str, np.ndarray], scale: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Our weights with B @ A added, where `scale` says how much for a module."""
    weights = {name: value.astype(np.float64) for name, value in weights_of(model).items()}
    for module, (ours, _, _) in MODULES.items():
        a, b = (arrays.get(f"base_model.model.{module}.lora_{part}.weight") for part in "AB")
        if a is None:
            continue
        added = scale[module] * (b.astype(np.float64) @ a)
        names = [ours.format(x) for x in "qkv"] if "{}" in ours else [ours]
        for name, rows in zip(names, np.split(added, len(names)), strict=True):
            name = f"{name}.weight"
            weights[name] = weights.get(name, weights["wte.weight"]) + rows
    return weights


def assert_computes(folder: Path, config: Any, weights: Mapping[str, np.ndarray]) -> None:
    model = GPT.from_pretrained(folder)
    found = model(Tensor(TOKENS.astype(np.int32))).numpy()
    np.testing.assert_allclose(found, Reference(config, weights)(TOKENS), atol=2e-3)


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, int], dict[str, float]]] = {
    "c_attn": (C_ATTN, {}, {}, {}),
    "every linear layer of a block": (tuple(MODULES)[:5], {}, {}, {}),
    "fan_in_fan_out as it should not be": (C_ATTN, {"fan_in_fan_out": False}, {}, {}),
    "use_rslora": (C_ATTN, {"use_rslora": True}, {}, dict.fromkeys(C_ATTN, 6 / math.sqrt(4))),
    "rank_pattern": (
        tuple(MODULES)[:5],
        {"rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 3}},
        {"transformer.h.0.attn.c_attn": 2, "transformer.h.0.mlp.c_fc": 3},
        {"transformer.h.0.attn.c_attn": 3, "transformer.h.0.mlp.c_fc": 2},
    ),
    "alpha_pattern": (
        tuple(MODULES)[:5],
        {"alpha_pattern": {"c_fc": 2, "_attn": 99, "transformer.h.1.attn.c_attn": 10}},
        {},
        {"transformer.h.0.mlp.c_fc": 0.5, "transformer.h.1.attn.c_attn": 2.5},
    ),
    "the head of a tied model": (("lm_head",), {"target_modules": ["lm_head"]}, {}, {}),
}


@pytest.mark.parametrize("kind", CASES)
def test_an_adapter_is_merged_into_its_model(kind, base, tmp_path):
    modules, settings, ranks, scales = CASES[kind]
    arrays = matrices(modules, ranks)
    settings = settings | {"base_model_name_or_path": str(base[0])}
    folder = put(tmp_path / "lora", arrays, **settings)
    scale = {module: scales.get(module, 6 / 4) for module in modules}
    config = replace(CONFIG, tie_word_embeddings="lm_head" not in modules)
    weights = merged(base[1], arrays, scale)
    assert_computes(folder, config, weights)
    assert_computes(folder / "adapter_model.safetensors", config, weights)
    plain = Reference(CONFIG, weights_of(base[1]))(TOKENS)
    assert np.abs(plain - Reference(config, weights)(TOKENS)).max() > 1


@pytest.mark.parametrize("name", ["wte", "lm_head", "ln_f"])
def test_modules_to_save_take_the_place_of_the_models_own(name, base, tmp_path):
    """Of a tied pair peft replaces one, and the other stays as it was."""
    arrays, weights = matrices(C_ATTN, {}), weights_of(base[1])
    value = np.random.default_rng(5).normal(0, 1, (C,) if name == "ln_f" else (V, C))
    full = name if name == "lm_head" else f"transformer.{name}"
    arrays[f"base_model.model.{full}.weight"] = value.astype(np.float32)
    folder = put(tmp_path / "lora", arrays, base_model_name_or_path=str(base[0]))
    weights = merged(base[1], arrays, dict.fromkeys(C_ATTN, 6 / 4))
    config = replace(CONFIG, tie_word_embeddings=name == "ln_f")
    if name != "ln_f":
        weights["lm_head.weight"] = weights["wte.weight"]
    assert_computes(folder, config, weights | {f"{name}.weight": value.astype(np.float32)})


def test_biases_that_were_trained_too_take_the_place_of_the_models_own(base, tmp_path):
    name, value = "blocks.0.mlp.c_fc.bias", np.arange(INNER, dtype=np.float32)
    arrays = matrices(C_ATTN, {})
    arrays["base_model.model.transformer.h.0.mlp.c_fc.base_layer.bias"] = value
    folder = put(tmp_path / "lora", arrays, base_model_name_or_path=str(base[0]), bias="all")
    weights = merged(base[1], arrays, dict.fromkeys(C_ATTN, 6 / 4))
    assert_computes(folder, CONFIG, weights | {name: value})


@pytest.mark.parametrize("given", ["../base", "base", "relative"])
def test_the_model_below_is_found_beside_the_adapter_or_where_the_program_runs(
    given, base, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(base[0].parent)
    name = {"../base": "../base", "base": "base", "relative": "./base"}[given]
    place = base[0].parent if given == "../base" else tmp_path
    folder = put(place / f"lora {given[:2]}", matrices(C_ATTN, {}), base_model_name_or_path=name)
    assert open_checkpoint(folder).config == CONFIG
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "is an adapter: merged into" in err


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_an_adapter_over_a_narrow_model_is_rounded_once(dtype, base, tmp_path):
    model = GPT.from_pretrained(base[0], {"F16": "float16", "BF16": "bfloat16"}[dtype])
    model.save_pretrained(tmp_path / "base")
    arrays = matrices(C_ATTN, {})
    folder = put(tmp_path / "lora", arrays)
    wide = GPT.from_pretrained(tmp_path / "base", "float32")
    weights = merged(wide, arrays, dict.fromkeys(C_ATTN, 6 / 4))
    found = weights_of(GPT.from_pretrained(folder, "float32"))
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_an_adapters_own_tokenizer_goes_before_its_models(tmp_path):
    bytes_model = GPT(replace(CONFIG, vocab_size=257))
    bytes_model.save_pretrained(tmp_path / "base")
    save_with_bytes(bytes_model, tmp_path / "other")
    folder = put(tmp_path / "lora", matrices(C_ATTN, {}))
    for file in (tmp_path / "other").glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            file.rename(folder / file.name)
    assert same_tokenizer(open_checkpoint(folder).tokenizer(), load_tokenizer("bytes"))


# What is refused: settings and tensors that are changed -> the words of the one line.
LORA_A, LORA_B = (f"base_model.model.{C_ATTN[0]}.lora_{part}.weight" for part in "AB")
ZEROS = np.zeros((4, 4), np.float32)
FAULTS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray | None], str]] = {
    "another kind": ({"peft_type": "IA3"}, {}, "peft_type is 'IA3': only LORA can be loaded"),
    "no kind": ({"peft_type": None}, {}, "peft_type is None"),
    "DoRA": ({"use_dora": True}, {}, "use_dora is set, which is not computed here: merge it with"),
    "a bias of B": ({"lora_bias": True}, {}, "lora_bias is set"),
    "layers twice": ({"layer_replication": [[0, 2]]}, {}, "layer_replication is set"),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa', which changes"),
    "a start of no kind": ({"init_lora_weights": [1]}, {}, "init_lora_weights is"),
    "r of no kind": ({"r": "8"}, {}, "r is '8': it must be a whole number"),
    "r of zero": ({"r": 0}, {}, "r is 0"),
    "alpha of no kind": ({"lora_alpha": None}, {}, "lora_alpha is None: it must be a finite"),
    "alpha without end": ({"lora_alpha": 1e999}, {}, "lora_alpha is inf"),
    "another rank": ({"r": 5}, {}, r"a rank of 4 for h.0.attn.c_attn, where .* says \{5\}"),
    "a pattern of no kind": ({"alpha_pattern": [1]}, {}, "alpha_pattern is"),
    "a pattern of no number": ({"alpha_pattern": {"c_attn": "x"}}, {}, "alpha_pattern is 'x'"),
    "a regular expression": (
        {"alpha_pattern": {"(a+)+$": 1}}, {}, "alpha_pattern is .*only plain names can be read"
    ),
    "no model below": ({"base_model_name_or_path": None}, {}, "base_model_name_or_path is None"),
    "a model that is not there": (
        {"base_model_name_or_path": "./gone"}, {}, "its base_model_name_or_path: no folder or file"
    ),
    "a long name": ({"base_model_name_or_path": "x" * 9999}, {}, "base_model_name_or_path is 'xxx"),
    "one matrix": ({}, {LORA_A: None}, "has only one matrix for h.0.attn.c_attn"),
    "another width": ({}, {LORA_B: ZEROS}, r"does not fit h.0.attn.c_attn: A is \(4, 16\) and B"),
    "a vector": ({}, {LORA_A: ZEROS[0]}, "does not fit"),
    "no such layer": (
        {}, {LORA_A.replace(".0.", ".7."): ZEROS, LORA_B.replace(".0.", ".7."): ZEROS},
        "changes 'h.7.attn.c_attn', which is no linear layer"
    ),
    "an embedding": (
        {}, {"base_model.model.transformer.wte.lora_embedding_A": ZEROS},
        "has 'wte.lora_embedding_A', which is no part of the model: merge it with peft"
    ),
    "another vocabulary": (
        {}, {"base_model.model.transformer.wte.weight": ZEROS}, r"wte.weight is \(4, 4\)"
    ),
    "no numbers": ({}, {LORA_A: np.full((4, C), np.nan, np.float32)}, "infinite or not a number"),
    "whole numbers": ({}, {LORA_A: np.zeros((4, C), np.int32)}, "is I32, no type of floats"),
    "numbers without end": (
        {}, {LORA_A: np.full((4, C), 1e30, np.float32), LORA_B: np.full((3 * C, 4), 1e30, "f4")},
        "makes values of h.0.attn.c_attn.weight that are infinite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_an_adapter_that_cannot_be_merged_is_refused_in_one_line(kind, base, tmp_path):
    settings, changes, words = FAULTS[kind]
    arrays = matrices(C_ATTN, {}) | changes
    arrays = {name: value for name, value in arrays.items() if value is not None}
    settings = {"base_model_name_or_path": str(base[0])} | settings
    folder = put(tmp_path / "lora", arrays, **settings)
    with pytest.raises(InputError, match=words) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(folder)) + 500


def test_a_model_below_that_is_no_transformers_one_is_refused(base, tmp_path):
    (tmp_path / "base").mkdir()
    save_gguf(base[1], tmp_path / "base" / "x.gguf")
    folder = put(tmp_path / "lora", matrices(C_ATTN, {}))
    with pytest.raises(CheckpointError, match=r"must be of Hugging Face's form.*of GGUF's"):
        GPT.from_pretrained(folder)


def test_an_adapter_over_itself_is_refused(tmp_path):
    folder = put(tmp_path / "lora", matrices(C_ATTN, {}), base_model_name_or_path=".")
    with pytest.raises(CheckpointError, match=r"none of model.safetensors"):
        GPT.from_pretrained(folder)


def test_an_adapters_settings_without_its_file_are_told(tmp_path):
    folder = put(tmp_path / "lora", matrices(C_ATTN, {}))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but neither adapter_model.safetensors nor"):
        GPT.from_pretrained(folder)
