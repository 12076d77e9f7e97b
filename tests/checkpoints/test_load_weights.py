"""Checkpoints made by hand, by us, and broken: what is loaded is what was meant, or nothing is.

The files are built here from GPT-2's published layout, with NumPy alone.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize, weights_of

from tinygpt import GPT, GPTConfig, InputError
from tinygpt.checkpoints.config_json import read_config
from tinygpt.checkpoints.quantization import convert
from tinygpt.checkpoints.safetensors_file import read_header, write
from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.errors import CheckpointError

# No two sizes alike, so that no axis can pass for another.
TINY = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11, n_inner=12)
CONFIG = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "n_positions": 6,
    "vocab_size": 11,
    "n_inner": 12,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

Arrays = dict[str, np.ndarray]


def their_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """GPT-2's tensors as published: a linear layer's weight is (in, out)."""
    C, inner = config.n_embd, config.inner_dim
    linear = {
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (C, inner),
        "mlp.c_proj": (inner, C),
    }
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    for layer in range(config.n_layer):
        for name, shape in (linear | {"ln_1": (C,), "ln_2": (C,)}).items():
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = shape[-1:]
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def their_weights(dtype: type = np.float32) -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s).astype(dtype) for name, s in their_shapes(TINY).items()}


def our_weights(theirs: Arrays) -> Arrays:
    """What a model is to hold after loading: float32, split and transposed one by one."""
    ours: Arrays = {}
    for name, value in theirs.items():
        value = value.astype(np.float32)
        name = name.replace("h.", "blocks.", 1) if name.startswith("h.") else name
        if ".attn.c_attn." in name:
            C = TINY.n_embd
            for i, part in enumerate("qkv"):
                piece = value[..., i * C : (i + 1) * C]
                ours[name.replace("c_attn", f"{part}_proj")] = piece.T
        elif name.endswith(".weight") and (".mlp." in name or ".attn." in name):
            ours[name.replace("attn.c_proj", "attn.out_proj")] = value.T
        else:
            ours[name.replace("attn.c_proj", "attn.out_proj")] = value
    return ours


def put(path: Path, arrays: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    own = {np.dtype(np.uint8): "U8", np.dtype(np.int32): "I32"}  # masks and mistakes stay integers
    layout = {name: (own.get(value.dtype, dtype), value.shape) for name, value in arrays.items()}
    write(path, layout, arrays.__getitem__, {"format": "pt"})


def put_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")


def put_shards(folder: Path, first: Arrays, second: Arrays, **changes: str) -> None:
    """Two shards and their index, in which `changes` replace the files of some tensors."""
    put(folder / PARTS[0], first)
    put(folder / PARTS[1], second)
    files = dict.fromkeys(first, PARTS[0]) | dict.fromkeys(second, PARTS[1]) | changes
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint, for a test to change."""
    folder = tmp_path / "model"
    folder.mkdir()
    put_config(folder)
    put(folder / WEIGHTS, their_weights())
    return folder


# Saved and loaded by us.

CONFIGS = {
    "gpt2": {},
    "post-norm": {"norm": "post"},
    "deep norm": {"norm": "deep"},
    "sinusoidal": {"position": "sinusoidal"},
    "no bias": {"bias": False},
    "own head": {"tie_word_embeddings": False},
    "no shortcut": {"shortcut": False},
    "usual inner width": {"n_inner": None},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "numbers": {
        "layer_norm_epsilon": 1e-3, "embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3,
        "initializer_range": 0.05,
    },
    "all": {
        "norm": "post", "position": "sinusoidal", "bias": False, "shortcut": False,
        "tie_word_embeddings": False, "activation": "relu",
    },
}  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, options):
    model = randomize(GPT(replace(TINY, **options)))
    model.save_pretrained(tmp_path / "new" / "folder")
    again = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert_same(weights_of(again), weights_of(model))


def test_saved_files_have_gpt2s_form(tmp_path):
    model = randomize(GPT(replace(TINY, tie_word_embeddings=False)))
    model.save_pretrained(tmp_path)
    tensors, metadata = read_header(tmp_path / WEIGHTS)
    expected = {f"transformer.{name}": shape for name, shape in their_shapes(TINY).items()}
    expected["lm_head.weight"] = (TINY.vocab_size, TINY.n_embd)
    assert {name: info.shape for name, info in tensors.items()} == expected
    assert {info.dtype for info in tensors.values()} == {"F32"}
    assert metadata == {"format": "pt"}  # transformers asks for it
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["activation_function"] == "gelu_new"
    assert CONFIG.items() <= config.items()


@pytest.mark.parametrize("option", ["post-norm", "sinusoidal", "no shortcut"])
def test_what_gpt2_cannot_express_is_marked_as_ours(tmp_path, option):
    GPT(replace(TINY, **CONFIGS[option])).save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"]
        == "tinygpt"
    )


def test_saving_replaces_what_was_there(tmp_path):
    for seed in (1, 2):
        model = randomize(GPT(TINY), seed)
        model.save_pretrained(tmp_path)
    assert_same(weights_of(GPT.from_pretrained(tmp_path)), weights_of(model))
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]


# Made by hand.


def add_masks(arrays: Arrays) -> Arrays:
    """With the causal masks that older files carry along."""
    masks = {f"h.{i}.attn.bias": np.tri(6, dtype=np.uint8)[None, None] for i in range(2)}
    scalars = {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(2)}
    return arrays | masks | scalars


def add_head(arrays: Arrays) -> Arrays:
    """With a copy of the token embedding, which needs no place in a tied model."""
    return arrays | {"lm_head.weight": arrays["wte.weight"]}


def add_prefix(arrays: Arrays) -> Arrays:
    return {n if n.startswith("lm_head") else f"transformer.{n}": a for n, a in arrays.items()}


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (add_prefix,),
        (add_masks,),
        (add_masks, add_prefix),
        (add_head,),
        (add_masks, add_head, add_prefix),
    ],
    ids=lambda changes: " ".join(change.__name__ for change in changes) or "plain",
)
def test_each_spelling_of_a_checkpoint_loads(folder, changes):
    arrays = theirs = their_weights()
    for change in changes:
        arrays = change(arrays)
    put(folder / WEIGHTS, arrays)
    model = GPT.from_pretrained(str(folder))
    assert model.config == TINY
    assert_same(weights_of(model), our_weights(theirs))


def test_an_untied_head_is_loaded(folder):
    head = np.random.default_rng(1).normal(size=(11, 8)).astype(np.float32)
    put(folder / WEIGHTS, their_weights() | {"lm_head.weight": head})
    put_config(folder, tie_word_embeddings=False)
    expected = our_weights(their_weights()) | {"lm_head.weight": head}
    assert_same(weights_of(GPT.from_pretrained(folder)), expected)


def test_fused_attention_is_split_in_order_and_transposed(folder):
    """Ours, applied as (out, in), give what theirs, applied as (in, out), gives."""
    rng = np.random.default_rng(2)
    theirs = their_weights()
    parts = {part: rng.normal(size=(8, 8)).astype(np.float32) for part in "qkv"}
    biases = {part: rng.normal(size=8).astype(np.float32) for part in "qkv"}
    fused = np.concatenate([parts[part].T for part in "qkv"], axis=1)  # (C, 3C)
    theirs["h.1.attn.c_attn.weight"] = fused
    theirs["h.1.attn.c_attn.bias"] = np.concatenate([biases[part] for part in "qkv"])
    put(folder / WEIGHTS, theirs)
    ours = weights_of(GPT.from_pretrained(folder))
    x = rng.normal(size=(5, 8))
    qkv = x @ fused + theirs["h.1.attn.c_attn.bias"]  # (5, 3C)
    for i, part in enumerate("qkv"):
        name = f"blocks.1.attn.{part}_proj"
        np.testing.assert_array_equal(ours[f"{name}.weight"], parts[part])
        np.testing.assert_array_equal(ours[f"{name}.bias"], biases[part])
        y = x @ ours[f"{name}.weight"].T + ours[f"{name}.bias"]
        np.testing.assert_allclose(y, qkv[:, 8 * i : 8 * (i + 1)], rtol=1e-12)
    for name, feature in (("c_fc", 8), ("c_proj", 12)):
        x = rng.normal(size=(5, feature))
        theirs_y = x @ theirs[f"h.0.mlp.{name}.weight"]
        np.testing.assert_allclose(x @ ours[f"blocks.0.mlp.{name}.weight"].T, theirs_y, rtol=1e-12)


def test_shards_are_put_together(folder):
    theirs = add_prefix(add_masks(their_weights()))
    names = list(theirs)
    halves = [{name: theirs[name] for name in part} for part in (names[::2], names[1::2])]
    (folder / WEIGHTS).unlink()
    put_shards(folder, *halves)
    assert_same(weights_of(GPT.from_pretrained(folder)), our_weights(their_weights()))


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to 8 significant bits, a tie to the even one."""
    mantissa, exponent = np.frexp(array.astype(np.float32))
    return np.ldexp(np.round(np.ldexp(mantissa, 8)), exponent - 8)


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [
        ("F64", lambda array: array),
        ("F32", lambda array: array.astype(np.float32)),
        ("F16", lambda array: array.astype(np.float16)),
        ("BF16", bfloat16),
    ],
)
def test_each_float_type_is_read_exactly(folder, dtype, rounded):
    theirs = their_weights(np.float32 if dtype == "BF16" else np.float64)
    put(folder / WEIGHTS, theirs, dtype)
    assert {info.dtype for info in read_header(folder / WEIGHTS)[0].values()} == {dtype}
    expected = our_weights({name: rounded(array) for name, array in theirs.items()})
    assert_same(weights_of(GPT.from_pretrained(folder, "float32")), expected)
    held = convert(GPT.from_pretrained(folder), "float32")  # in between as it is stored
    assert_same(weights_of(held), expected)


def test_values_beyond_the_dtype_that_is_asked_for_are_refused(folder):
    put(folder / WEIGHTS, their_weights() | {"wpe.weight": np.full((6, 8), 1e6)})
    GPT.from_pretrained(folder, "float16")  # in which positions are not held
    put(folder / WEIGHTS, their_weights() | {"wte.weight": np.full((11, 8), 1e6)})
    with pytest.raises(
        CheckpointError, match=r"model: wte.weight has values too large for float16"
    ):
        GPT.from_pretrained(folder, "float16")


@pytest.mark.parametrize(("dtype", "held", "copies"), [("float32", 4, 4), ("int8", 1, 12)])
def test_the_memory_that_is_asked_for_is_the_models_and_that_of_reading(
    dtype, held, copies, folder, monkeypatch
):
    asked = []
    where = "tinygpt.runtime.memory.require_memory"
    monkeypatch.setattr(where, lambda size, what: asked.append((size, what)))
    GPT.from_pretrained(folder, dtype)
    count = [value.size for value in their_weights().values()]
    # Two tensors are read at a time, each with its bytes as stored.
    size = held * sum(count) + 2 * (copies + 4) * max(count)
    assert asked == [(size, f"the model in {folder}")]


def test_two_files_of_other_names_are_a_question(tmp_path):
    for name in ("b.pt", "a.pth"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"none of .*, but a.pth, b.pt: give the one file's"):
        GPT.from_pretrained(tmp_path)


def test_zero_biases_are_let_go_where_config_has_none(folder):
    theirs = their_weights()
    zeroed = {n: np.zeros_like(a) if n.endswith(".bias") else a for n, a in theirs.items()}
    put(folder / WEIGHTS, zeroed)
    put_config(folder, bias=False)
    expected = {n: a for n, a in our_weights(theirs).items() if not n.endswith(".bias")}
    assert_same(weights_of(GPT.from_pretrained(folder)), expected)


# config.json.


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"n_layer": 3}, "n_layer", 3),
        ({"num_hidden_layers": 3}, "n_layer", 3),
        ({"n_head": 6}, "n_head", 6),
        ({"num_attention_heads": 6}, "n_head", 6),
        ({"n_embd": 24}, "n_embd", 24),
        ({"hidden_size": 24}, "n_embd", 24),
        ({"n_ctx": 20}, "block_size", 20),
        ({"n_positions": 20}, "block_size", 20),
        ({"max_position_embeddings": 20}, "block_size", 20),
        ({"n_ctx": 10, "n_positions": 20}, "block_size", 20),
        ({"vocab_size": 99}, "vocab_size", 99),
        ({"n_inner": 40}, "n_inner", 40),
        ({"n_inner": None}, "n_inner", None),
        ({"layer_norm_epsilon": 0.1}, "layer_norm_epsilon", 0.1),
        ({"scale_attn_weights": False}, "scale_attn_weights", False),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", True),
        ({"tie_word_embeddings": False}, "tie_word_embeddings", False),
        ({"embd_pdrop": 0.1}, "embd_pdrop", 0.1),
        ({"attn_pdrop": 0.1}, "attn_pdrop", 0.1),
        ({"resid_pdrop": 0.1}, "resid_pdrop", 0.1),
        ({"initializer_range": 0.5}, "initializer_range", 0.5),
        ({"activation_function": "gelu_new"}, "activation", "gelu_tanh"),
        ({"activation_function": "gelu_pytorch_tanh"}, "activation", "gelu_tanh"),
        ({"activation_function": "gelu_fast"}, "activation", "gelu_tanh"),
        ({"activation_function": "gelu"}, "activation", "gelu"),
        ({"activation_function": "gelu_python"}, "activation", "gelu"),
        ({"activation_function": "relu"}, "activation", "relu"),
        ({"norm": "post"}, "norm", "post"),
        ({"position": "sinusoidal"}, "position", "sinusoidal"),
        ({"shortcut": False}, "shortcut", False),
        ({"bias": False}, "bias", False),
        ({"use_cache": True, "summary_type": "cls_index"}, "n_layer", 12),
        ({"add_cross_attention": False, "pruned_heads": {}}, "n_layer", 12),
    ],
    ids=str,
)
def test_config_fields_are_honoured(tmp_path, given, field, value):
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    assert read_config(tmp_path / "config.json") == replace(GPTConfig(), **{field: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_cross_attention": True}, "add_cross_attention is set"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is set"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is set"),
        ({"activation_function": "swish"}, "unknown activation_function 'swish'"),
        ({"activation_function": "gelu_neu"}, "did you mean 'gelu_new'"),
        ({"activation_function": ["relu"]}, r"unknown activation_function \['relu'\]"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"n_embd": "8"}, "n_embd is '8'"),
        ({"n_embd": -8}, "n_embd is -8"),
        ({"n_embd": 8.0}, "n_embd is 8.0"),
        ({"n_embd": True}, "n_embd is True"),
        ({"n_embd": None}, "n_embd is None"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_head": 3}, "n_embd 8 is not divisible by n_head 3"),
        ({"n_layer": [2]}, r"n_layer is \[2\]"),
        ({"n_positions": 0.5}, "block_size is 0.5"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"norm": "both"}, "unknown norm 'both'"),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused_by_name(folder, changes, words):
    put_config(folder, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        GPT.from_pretrained(folder)
    assert "config.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


# Broken folders.


def rewrite(change: Callable[[Arrays], object]) -> Callable[[Path], object]:
    """Change the arrays of a folder's weights."""

    def apply(folder: Path) -> None:
        arrays = their_weights()
        change(arrays)
        put(folder / WEIGHTS, arrays)

    return apply


def shard(
    first: tuple[str, ...], second: tuple[str, ...], **changes: str
) -> Callable[[Path], object]:
    """Two shards in the place of the one file, holding the tensors that start so."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        parts = [
            {n: a for n, a in their_weights().items() if n.startswith(starts)}
            for starts in (first, second)
        ]
        put_shards(folder, *parts, **changes)

    return apply


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def lose_shard(folder: Path) -> None:
    shard(("h.0",), ("h.1", "w", "ln_f"))(folder)
    (folder / PARTS[1]).unlink()


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text, encoding="utf-8")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json: is a directory",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        "none of model.safetensors, model.safetensors.index.json, .* is there",
    ),
    "config not JSON": (config_text('{"n_layer": '), "config.json: its JSON is damaged"),
    "config a list": (config_text("[1, 2]"), "config.json: it must hold a JSON object"),
    "config a text": (config_text('"gpt2"'), "config.json: it must hold a JSON object"),
    "config empty": (config_text(""), "config.json: it must hold a JSON object"),
    "config says it twice": (config_text('{"n_head": 1, "n_head": 2}'), "'n_head' appears twice"),
    "key missing": (
        rewrite(lambda a: a.pop("h.1.mlp.c_fc.weight")),
        "missing h.1.mlp.c_fc.weight$",
    ),
    "keys missing": (
        rewrite(lambda a: (a.pop("wte.weight"), a.pop("h.0.ln_1.bias"))),
        "missing wte.weight, h.0.ln_1.bias$",
    ),
    "head missing": (
        lambda f: put_config(f, tie_word_embeddings=False),
        "missing lm_head.weight$",
    ),
    "key surplus": (
        rewrite(lambda a: a.update({"h.0.attn.rotary": np.ones(3, np.float32)})),
        "not part of the model: h.0.attn.rotary$",
    ),
    "key with a line break": (
        rewrite(lambda a: a.update({"a\nb": np.ones(3, np.float32)})),
        r"not part of the model: a\\nb$",
    ),
    "layer surplus": (
        lambda f: put_config(f, n_layer=1),
        "not part of the model: h.1.attn.c_attn.bias.* and 8 more$",
    ),
    "layer missing": (
        lambda f: put_config(f, n_layer=3),
        "missing h.2.ln_1.weight, h.2.ln_1.bias, h.2.attn.c_attn.weight, h.2.attn.c_attn.bias "
        "and 8 more$",
    ),
    "key twice": (
        rewrite(lambda a: a.update({"transformer.wte.weight": a["wte.weight"]})),
        "'wte.weight' is also in model.safetensors",
    ),
    "vocabulary smaller": (
        lambda f: put_config(f, vocab_size=10),
        r"wte.weight is \(11, 8\), config.json asks for \(10, 8\)",
    ),
    "weight transposed": (
        rewrite(lambda a: a.update({"h.0.mlp.c_fc.weight": a["h.0.mlp.c_fc.weight"].T})),
        r"h.0.mlp.c_fc.weight is \(12, 8\), config.json asks for \(8, 12\)",
    ),
    "whole numbers": (
        rewrite(lambda a: a.update({"ln_f.weight": np.ones(8, np.int32)})),
        "ln_f.weight is I32, allowed are F64, F32, F16, BF16",
    ),
    "weights cut": (cut, "model.safetensors: its tensors end at byte"),
    "weights empty": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        "model.safetensors: it is empty: fetch it again",
    ),
    "weights another format": (
        lambda f: (f / WEIGHTS).write_bytes(b"\x89PNG" + b"\xff" * 1000),
        "model.safetensors: it is an image",
    ),
    "weights no format": (
        lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 1000),
        "model.safetensors: it is cut or no safetensors file",
    ),
    "shard missing": (lose_shard, f"{PARTS[1]}: no such file"),
    "shard elsewhere": (
        shard(("h.0",), ("h.1", "w", "ln_f"), **{"wte.weight": "../x.safetensors"}),
        "index.json: '../x.safetensors' is not a plain .safetensors name",
    ),
    "tensor in two shards": (
        shard(("h.0", "wte"), ("h.1", "w", "ln_f")),
        f"{PARTS[1]}: 'wte.weight' is also in {PARTS[0]}",
    ),
    "shards without a tensor": (shard(("h.0",), ("h.1", "w")), "missing ln_f.weight, ln_f.bias$"),
    "index without files": (
        lambda f: (
            (f / WEIGHTS).unlink(),
            (f / INDEX).write_text('{"weight_map": {}}', encoding="utf-8"),
        ),
        "weight_map must map each tensor to its file",
    ),
    "bias not zero": (
        lambda f: put_config(f, bias=False),
        "ln_1.bias is not zero, but config.json says no bias",
    ),
    "layers without end": (lambda f: put_config(f, n_layer=10**9), "n_layer 1000000000"),
}


@pytest.mark.parametrize(("damage", "words"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_folder_is_refused_by_name(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        GPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(folder))


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no folder or file .*/absent'") as caught:
        GPT.from_pretrained(tmp_path / "absent")
    assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(InputError, match="/pipe' is neither a folder nor a file"):
        GPT.from_pretrained(tmp_path / "pipe")


# Too little memory, too little disk.


def test_what_cannot_fit_in_memory_is_refused_before_it_is_read(folder, monkeypatch):
    def read_tensor(*_: object) -> np.ndarray:
        raise AssertionError("weights were read")

    small = GPT(TINY)
    monkeypatch.setattr("tinygpt.runtime.memory.available_memory_bytes", lambda: 1000)
    monkeypatch.setattr("tinygpt.checkpoints.load_weights.read_tensor", read_tensor)
    for action, words in (
        (lambda: GPT.from_pretrained(folder), f"the model in {folder} needs"),
        (lambda: GPT(TINY), "a model of this shape needs"),
        (lambda: small.empty_cache(3, 6), "the cache for a batch of 3 needs"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            action()
        assert "MiB of memory" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unknown_memory_refuses_nothing(folder, monkeypatch):
    monkeypatch.setattr("tinygpt.runtime.memory.available_memory_bytes", lambda: None)
    GPT.from_pretrained(folder).empty_cache(1, 6)


def test_a_full_disk_leaves_the_old_files_and_no_others(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    randomize(GPT(TINY), seed=1).save_pretrained(tmp_path)
    before = contents()
    assert set(before) == {"config.json", WEIGHTS}
    other = randomize(GPT(replace(TINY, activation="relu")), seed=2)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match=r"cannot write .*model.safetensors: no space left"):
        other.save_pretrained(tmp_path)
    assert contents() == before
    with pytest.raises(InputError, match="no space left"):
        other.save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_target_that_cannot_be_written_is_refused(tmp_path):
    model = GPT(TINY)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder" / WEIGHTS).mkdir(parents=True)
    for target, words in (
        ("file", "cannot write .*file: file exists"),
        ("file/below", "cannot write .*below: not a directory"),
        ("folder", "cannot write .*model.safetensors: it is there, but not as a file"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            model.save_pretrained(tmp_path / target)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert os.listdir(tmp_path / "folder") == [WEIGHTS]


# Its own peak, not what it was forked from: getrusage would carry that over.
CHILD = """
import sys
from pathlib import Path
from tinygpt import GPT

model = GPT.from_pretrained(sys.argv[1])
status = Path("/proc/self/status").read_text().splitlines()
print(model.config.parameter_count, next(x for x in status if x.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read a peak from")
def test_loading_gpt2_holds_its_weights_only_once(tmp_path):
    config = GPTConfig.preset("gpt2")
    shapes = their_shapes(config)
    layout = {name: ("F32", shape) for name, shape in shapes.items()}
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    write(tmp_path / WEIGHTS, layout, lambda name: np.zeros(shapes[name], np.float32))
    try:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            encoding="utf-8",
        )
    finally:
        (tmp_path / WEIGHTS).unlink()
    assert child.returncode == 0, child.stderr
    parameters, peak_kib = map(int, child.stdout.split())
    assert parameters == config.parameter_count == 124_439_808
    assert 4 * parameters < peak_kib * 1024 < 1.3e9


def test_a_bar_shows_where_much_is_read_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for least, shown in ((1, True), (1 << 40, False)):
        for module in ("load_weights", "safetensors_file", "gguf_file"):
            monkeypatch.setattr(f"tinygpt.checkpoints.{module}.LONG_BYTES", least)
        GPT(TINY).save_pretrained(tmp_path / "model")
        save_gguf(GPT.from_pretrained(tmp_path / "model"), tmp_path / "x.gguf")
        said = capsys.readouterr().err
        for words in ("writing model.safetensors", "reading model", "writing x.gguf"):
            assert (f"{words}: 100%" in said) == shown
