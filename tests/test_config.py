from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from conftest import SMALL
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT, GPTConfig, InputError
from tinygpt.checkpoints.config_json import beyond_gpt2, to_json
from tinygpt.config import PRESETS


def test_presets_are_the_published_sizes():
    shapes = {name: GPTConfig.preset(name) for name in PRESETS}
    millions = {name: round(config.parameter_count / 1e6) for name, config in shapes.items()}
    # transformers' own counts of these models' parameters
    assert {k: v for k, v in millions.items() if k.startswith("gpt2")} == {
        "gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558
    }  # fmt: skip
    assert all(millions[name] <= 11 for name in ("nano", "mini"))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "post", "position": "sinusoidal"}, {"bias": False, "n_inner": 7},
     {"tie_word_embeddings": False}],
)  # fmt: skip
def test_parameter_count_is_the_models(options):
    config = dataclasses.replace(SMALL, **options)
    model = GPT(config, seed=None)
    assert config.parameter_count == sum(p.numel() for p in get_state_dict(model).values())


def test_it_is_frozen_and_derives_sizes():
    config = GPTConfig.preset("gpt2", norm="post")
    assert (config.head_dim, config.inner_dim, config.norm) == (64, 3072, "post")
    assert GPTConfig(n_inner=10).inner_dim == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0), ("n_head", -1), ("n_embd", "768"), ("block_size", 1.5), ("n_layer", True),
        ("vocab_size", None), ("n_inner", 0), ("norm", "middle"), ("norm", 1),
        ("position", "rotary"), ("activation", "silu"), ("activation", ["gelu"]), ("bias", 1),
        ("shortcut", "no"), ("tie_word_embeddings", None), ("layer_norm_epsilon", -1e-5),
        ("layer_norm_epsilon", "small"), ("attn_pdrop", 1.0), ("resid_pdrop", float("nan")),
        ("initializer_range", float("inf")), ("initializer_range", 10**400), ("n_head", 5),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=field) as caught:
        GPTConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_sinusoids_need_an_even_width():
    with pytest.raises(InputError, match="even"):
        GPTConfig(n_embd=15, n_head=3, position="sinusoidal")


def test_a_near_miss_is_offered():
    with pytest.raises(InputError, match="'gpt2-large'"):
        GPTConfig.preset("gpt2-lrage")
    with pytest.raises(InputError, match="'n_layer'"):
        GPTConfig.preset("gpt2", n_layers=3)


def test_what_gpt2_cannot_say_is_told_by_name():
    """A field that config.json does not know is none of GPT-2's, also one that is yet to come."""
    assert beyond_gpt2(SMALL) == {}
    changed = replace(SMALL, norm="post", position="sinusoidal", shortcut=False, bias=False)
    expected = {"norm": "post", "position": "sinusoidal", "shortcut": False}
    assert beyond_gpt2(changed) == expected
    assert to_json(changed, "float32", {})["model_type"] == "tinygpt"
