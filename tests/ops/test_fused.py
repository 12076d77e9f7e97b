from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL, needs_clang, randomize
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt import GPT
from tinygpt.ops import fused

pytestmark = needs_clang
# More tokens than attention takes at once, and not a whole number of anything.
SHAPE = replace(SMALL, block_size=80)
B, T = 3, 71


def plain_and_fused(config, monkeypatch) -> list[dict[str, np.ndarray]]:
    """The losses, and the gradients of a weighted sum of them, both ways."""
    model, rng, found = randomize(GPT(config)), np.random.default_rng(0), []
    weights = get_state_dict(model)
    tokens, targets = (Tensor(rng.integers(0, 67, (B, T)).astype(np.int32)) for _ in range(2))
    share = Tensor(rng.random((B, T)).astype(np.float32))
    Tensor.realize(tokens, targets, share)
    for kernels in "01":
        monkeypatch.setenv("TINYGPT_KERNELS", kernels)
        losses = functools.partial(fused.token_losses, model, tokens, targets)
        assert fused.usable(model) == (kernels == "1")
        gradients = (losses() * share).sum().gradient(*weights.values())
        found.append({"losses": losses().numpy()})
        found[-1] |= {n: g.numpy() for n, g in zip(weights, gradients, strict=True)}
    return found


@pytest.mark.parametrize(
    ("form", "threads"),
    [
        ({}, 1),
        ({}, 2),
        ({"norm": "post", "activation": "gelu"}, 2),
        ({"bias": False, "activation": "relu", "tie_word_embeddings": False}, 2),
        ({"position": "sinusoidal", "shortcut": False, "n_inner": 24}, 2),
        ({"norm": "post", "shortcut": False, "scale_attn_by_inverse_layer_idx": True}, 2),
    ],
)
def test_losses_and_gradients_equal_the_plain_form(form, threads, monkeypatch):
    monkeypatch.setattr(fused, "count_threads", lambda flops: threads)
    plain, fast = plain_and_fused(replace(SHAPE, **form), monkeypatch)
    assert fast.keys() == plain.keys()
    for name, value in fast.items():
        # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
        size = 1.0 if name.endswith("k_proj.bias") else np.abs(plain[name]).max()
        np.testing.assert_allclose(value, plain[name], atol=2e-5 * size, err_msg=name)


def test_what_it_cannot_do_is_left_to_the_plain_form():
    model = GPT(replace(SHAPE, attn_pdrop=0.1))
    assert fused.usable(model)  # outside of training nothing is dropped
    with Tensor.train():
        assert not fused.usable(model)
    assert not fused.usable(GPT(replace(SHAPE, n_embd=12)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["wte.weight", "blocks.1.attn.q_proj.weight", "ln_f.bias"])
def test_a_weight_that_is_not_finite_shows_in_the_loss(name, bad):
    model = randomize(GPT(SHAPE))
    weight = get_state_dict(model)[name]
    value = weight.numpy().copy()
    value.reshape(-1)[:3] = bad
    weight.assign(Tensor(value)).realize()
    ids = Tensor(np.zeros((1, 8), np.int32)).realize()
    assert not np.isfinite(fused.token_losses(model, ids, ids).numpy()).all()


def test_the_sum_of_squares():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(np.float32) for size in (1, 15, 16, 1000)]
    found = fused.squares([Tensor(array) for array in arrays]).item()
    assert found == pytest.approx(sum(np.square(a, dtype=np.float64).sum() for a in arrays))


def test_an_id_outside_the_vocabulary_is_a_loss_of_nan_and_no_fault():
    model = randomize(GPT(SHAPE))
    ids = np.array([[1, 2, 3], [4, 10**6, -1]], np.int32)
    known, unknown = (Tensor(rows).realize() for rows in (np.ones((2, 3), np.int32), ids))
    for tokens, targets in ((unknown, known), (known, unknown)):
        losses = fused.token_losses(model, tokens, targets)
        assert np.isfinite(losses.numpy()[0]).all()  # one text is nothing to another
        assert np.isnan(losses.numpy()[1, 1:]).all()
        gradient = fused.token_losses(model, tokens, targets).sum().gradient(model.wte.weight)[0]
        assert gradient.shape == model.wte.weight.shape
        gradient.realize()
