"""The small model that learns to copy: its data, its parts, and that it does learn."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import needs_clang
from tinygrad.nn.state import get_state_dict

from tinygpt import GPTConfig
from tinygpt.commands.main import main
from tinygpt.study.heads import with_heads
from tinygpt.study.induction import attention_only, learn_induction, repeated
from tinygpt.study.shown import induction_report
from tinygpt.study.terminal import lines


def test_sequences_repeat_after_their_period_from_its_first_token():
    found = repeated(np.random.default_rng(0), 50)
    assert found.shape == (50, 65)
    assert set(np.unique(found)) <= set(range(64))
    periods = {next(p for p in range(1, 40) if (row[p:] == row[:-p]).all()) for row in found}
    assert min(periods) >= 6
    assert max(periods) <= 32
    assert len(periods) > 15
    fixed = repeated(np.random.default_rng(0), 3, 32)
    assert (fixed[:, 32:] == fixed[:, :33]).all()


def test_a_model_of_attention_alone_has_no_feed_forward():
    model = attention_only(GPTConfig(2, 2, 16, 8, 10), seed=0)
    assert not [name for name in get_state_dict(model) if "mlp" in name or "ln_2" in name]
    x = model.wte(np_ids := model.ids([[1, 2, 3]])) + model.encode_positions(model.ids([[0, 1, 2]]))
    for block in model.blocks:
        x = block.attn(block.ln_1(x), x)
    expected = model.logits(model.ln_f(x)).numpy()
    np.testing.assert_allclose(model(np_ids).numpy(), expected, atol=1e-5)
    assert with_heads(model, model.wte.weight[:2, :2])  # heads can be left out of it too


@needs_clang  # a minute without
def test_a_few_steps_are_measured_and_shown(capsys):
    told = []
    found = learn_induction(steps=4, every=2, tell=lambda *it: told.append(it))
    assert found.steps == [0, 2, 4] == [step for step, _, _ in told]
    assert found.first[0] == pytest.approx(np.log(64), abs=0.1)
    assert not found.found
    shown = "\n".join(lines(induction_report(found), 100))
    assert "no head is on that diagonal" in shown
    place = np.unravel_index(found.left_out.without.argmax(), (2, 4))
    assert "block {} head {} costs the most".format(*place) in shown.replace("\n", " ")
    assert main(["study", "induction", "--steps", "1"]) == 0
    captured = capsys.readouterr()
    assert "step 1: loss of the first copy" in captured.err
    assert "How copying is learnt" in captured.out
    for bad in (["a text"], ["--head", "1"], ["--steps", "0"]):
        assert main(["study", "induction", *bad]) == 2


@needs_clang
@pytest.mark.slow
def test_copying_is_learnt():
    found = learn_induction(steps=600)
    assert found.second[-1] < 1.0 < 4.0 < found.second[0]
    assert found.first[-1] > 4.0
    if found.found:
        assert found.left_out.matters.any()
