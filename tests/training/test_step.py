from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import randomize, weights_of
from tinygrad import Device, Tensor, dtypes

from tinygpt import GPT, InputError
from tinygpt.runtime import memory
from tinygpt.training.optimizers import StepInputs, global_norm
from tinygpt.training.settings import TrainConfig
from tinygpt.training.step import Counters, Trainer, sharing_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

TINY = TrainConfig(
    n_layer=1, n_head=2, n_embd=16, block_size=8, bias=True, batch_size=4, steps=10,
    warmup_steps=0, schedule="constant", sample_tokens=0,
)  # fmt: skip
VOCAB = 67


def fresh(config: TrainConfig = TINY) -> Trainer:
    return Trainer(randomize(GPT(config.gpt_config(VOCAB))), config)


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (2, TINY.batch_size, TINY.block_size)
    inputs, targets = np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)
    return inputs, targets


def torch_model(trainer: Trainer):
    pytest.importorskip("torch")
    from torch_loop import TorchGPT

    return TorchGPT(trainer.model.config).load(weights_of(trainer.model))


def torch_step(model, optimizer, inputs, targets) -> float:
    import torch
    from torch_loop import train_step

    tokens, targets = (
        torch.from_numpy(a.reshape(-1, a.shape[-1])).long() for a in (inputs, targets)
    )
    return train_step(model, optimizer, tokens, targets, TINY.grad_clip)


def same_weights(a: Trainer, b: Trainer) -> bool:
    ours, theirs = weights_of(a.model), weights_of(b.model)
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_ten_steps_equal_pytorch():
    trainer = fresh()
    theirs = torch_model(trainer)
    optimizer = theirs.adamw(TINY.learning_rate, (TINY.beta1, TINY.beta2), TINY.weight_decay)
    losses = []
    for seed in range(10):
        inputs, targets = batch(seed % 3)
        outcome = trainer.step([(inputs, targets)])
        assert outcome.good
        losses.append((outcome.loss, torch_step(theirs, optimizer, inputs, targets)))
    ours, expected = np.transpose(losses)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert ours[9] < ours[0] - 0.05


def test_a_step_is_the_gradients_and_then_the_optimizer_at_the_rates_of_the_schedule():
    config = replace(
        TINY, optimizer="muon", steps=4, warmup_steps=1, schedule="linear", learning_rate=0.01,
        min_learning_rate=0.001, muon_learning_rate=0.05, grad_clip=0.1,
    )  # fmt: skip
    trainer, twin = fresh(config), fresh(config)
    assert trainer.counters == Counters(0, 0, 0, 0, 1.0, 0)
    for update, (step, share) in enumerate(((0, 0.5), (2, 0.7)), 1):
        trainer.counters.step = step
        assert trainer.learning_rate == pytest.approx(0.01 * share)
        outcome = trainer.step([batch(step)])
        loss, gradients = twin.gradients(*map(Tensor, batch(step)))
        norm = global_norm(gradients)
        inputs = twin.optimizer.inputs(0.01 * share, 0.05 * share, update)
        given = StepInputs.of(Tensor(inputs.array()))
        written = twin.optimizer.updates(gradients, norm, given, Tensor(True))
        Tensor.realize(loss, norm, *written)
        expected = (loss.item(), norm.item(), True)
        assert outcome[:3] == pytest.approx(expected, rel=1e-5)
    assert (trainer.counters.step, trainer.counters.updates, trainer.counters.skipped) == (3, 2, 0)
    ours, theirs = weights_of(trainer.model), weights_of(twin.model)
    for name in ours:
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


def test_memory_for_weights_and_two_moments_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "require_memory", lambda size, what: asked.append((size, what)))
    trainer = fresh()
    count = trainer.model.config.parameter_count
    assert (3 * 4 * count, "training this model") in asked
    assert [what for _, what in asked][-1] == f"a batch of {trainer.config.batch_size}"


def test_a_model_that_shares_weights_follows_them():
    trainer = fresh()
    dropping = replace(trainer.model.config, attn_pdrop=0.5)
    twin = sharing_weights(trainer.model, dropping)
    trainer.step([batch(0)])
    assert twin.config == dropping
    np.testing.assert_array_equal(twin(batch(1)[0]).numpy(), trainer.model(batch(1)[0]).numpy())


def test_accumulated_batches_equal_the_whole_batch():
    config = replace(TINY, dropout=0.3)
    whole, parts = fresh(config), fresh(replace(config, batch_size=1, accumulate=4))
    for seed in range(3):
        inputs, targets = batch(seed)
        a = whole.step([(inputs, targets)])
        b = parts.step([(inputs[i : i + 1], targets[i : i + 1]) for i in range(4)])
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.norm == pytest.approx(b.norm, rel=1e-5)
    ours, theirs = weights_of(whole.model), weights_of(parts.model)
    for name in ours:  # AdamW's step is its largest where the gradient is nothing but rounding
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, err_msg=name)


def test_nothing_is_compiled_after_the_second_step(monkeypatch):
    from tinygrad.engine import realize

    trainer, compiled = fresh(replace(TINY, dropout=0.1)), []
    for seed in range(2):
        trainer.step([batch(seed)])
    monkeypatch.setattr(
        type(realize.Device["CPU"].compiler),
        "compile",
        lambda *_: compiled.append(1),
        raising=False,
    )
    for seed in range(2, 5):
        trainer.step([batch(seed)])
    assert not compiled


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step():
    config = replace(TINY, dropout=0.5, learning_rate=0.0, weight_decay=0.0)
    a, b, other = fresh(config), fresh(config), fresh(replace(config, seed=8))
    losses = [a.step([batch(0)]).loss for _ in range(4)]
    assert len(set(losses)) == 4
    b.counters.step = 2
    assert [b.step([batch(0)]).loss for _ in range(2)] == losses[2:]
    assert other.step([batch(0)]).loss != losses[0]


def test_a_step_that_is_not_finite_is_skipped():
    trainer, twin = fresh(), fresh()
    name = "blocks.0.mlp.c_fc.bias"
    trainer.step([batch(0)])
    twin.step([batch(0)])
    healthy = trainer.weights[name].numpy()
    broken = healthy.copy()
    broken[0] = np.nan
    trainer.weights[name].assign(Tensor(broken)).realize()
    outcome = trainer.step([batch(1)])
    assert not outcome.good
    assert np.isnan(outcome.loss)
    assert trainer.counters.skipped == trainer.counters.skipped_in_a_row == 1
    trainer.weights[name].assign(Tensor(healthy)).realize()
    assert same_weights(trainer, twin)
    assert trainer.step([batch(2)]).good  # as if the skipped step had not been,
    twin.counters.step = 2
    twin.step([batch(2)])
    assert same_weights(trainer, twin)
    assert trainer.counters.skipped_in_a_row == 0


@pytest.mark.slow
def test_half_precision_learns_like_float32():
    half, whole = fresh(replace(TINY, compute="float16")), fresh()
    pairs = [(half.step([batch(0)]).loss, whole.step([batch(0)]).loss) for _ in range(4)]
    ours, expected = np.transpose(pairs)
    assert not np.array_equal(ours, expected)
    np.testing.assert_allclose(ours, expected, rtol=0.03)
    assert ours[3] < ours[0]
    assert all(weight.dtype == dtypes.float32 for weight in half.weights.values())


def test_float16_finds_a_scale_that_fits():
    trainer = fresh(replace(TINY, compute="float16", learning_rate=0.0))
    counters = trainer.counters
    assert counters.loss_scale == 2.0**16
    assert fresh().counters.loss_scale == 1.0
    counters.loss_scale = 2.0**125
    assert not trainer.step([batch(0)]).good
    assert (counters.loss_scale, counters.updates_at_scale) == (2.0**124, 0)
    counters.loss_scale, norms = 64.0, []
    for before, scale, after in ((0, 64.0, 1), (1998, 64.0, 1999), (1999, 128.0, 0), (0, 128.0, 1)):
        counters.updates_at_scale = before
        outcome = trainer.step([batch(0)])
        assert outcome.good
        norms.append(outcome.norm)
        assert (counters.loss_scale, counters.updates_at_scale) == (scale, after)
    np.testing.assert_allclose(norms, fresh().step([batch(0)]).norm, rtol=0.02)
    counters.loss_scale = 1.0
    trainer.weights["ln_f.weight"].assign(trainer.weights["ln_f.weight"] * np.nan).realize()
    assert not trainer.step([batch(0)]).good
    assert (counters.loss_scale, counters.updates_at_scale) == (1.0, 0)


def test_a_type_that_does_not_compile_is_one_line(monkeypatch, capfd):
    compiler = type(Device[Device.DEFAULT].compiler)
    command = [sys.executable, "-c", "import sys; sys.exit('noise')"]
    monkeypatch.setattr(compiler, "compile", lambda *_: subprocess.check_call(command))
    monkeypatch.setattr(compiler, "compile_cached", compiler.compile)
    with pytest.raises(InputError, match=r"^compute is 'bfloat16', which .* use float32"):
        fresh(replace(TINY, compute="bfloat16"))
    assert capfd.readouterr().err == ""


def test_lora_trains_only_its_own_and_equals_the_adapter():
    trainer = fresh(replace(TINY, lora_rank=2, lora_alpha=4.0, learning_rate=0.01))
    before, inputs = weights_of(trainer.model), batch(0)[0]
    losses = [trainer.step([batch(0)]).loss for _ in range(8)]
    assert losses[7] < losses[0] - 0.02
    after, lora = weights_of(trainer.model), trainer.lora.tensors
    assert np.array_equal(after["wte.weight"], before["wte.weight"])
    name = "blocks.0.mlp.c_fc.weight"
    change = lora[f"{name}.lora_b"].numpy() @ lora[f"{name}.lora_a"].numpy() * 2.0
    assert np.abs(change).max() > 0.01
    np.testing.assert_allclose(after[name], before[name] + change, atol=1e-6)
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    adapter = x @ before[name].T + x @ lora[f"{name}.lora_a"].numpy().T @ (
        lora[f"{name}.lora_b"].numpy().T * 2.0
    )
    merged = trainer.model.blocks[0].mlp.c_fc(Tensor(x)).numpy() - after["blocks.0.mlp.c_fc.bias"]
    np.testing.assert_allclose(merged, adapter, atol=1e-5)
    assert np.isfinite(trainer.model(Tensor(inputs)).numpy()).all()


@pytest.mark.parametrize(
    ("norm", "kernels", "shape"),
    [
        ("pre", "1", {}),
        ("pre", "0", {}),
        ("post", "1", {"bias": False, "activation": "relu"}),
        ("post", "1", {"activation": "gelu"}),
    ],
)
def test_gradients_equal_pytorch(norm, kernels, shape, monkeypatch):
    monkeypatch.setenv("TINYGPT_KERNELS", kernels)
    trainer = fresh(replace(TINY, norm=norm, **shape))
    theirs = torch_model(trainer)
    inputs, targets = batch(1)
    torch_step(theirs, theirs.adamw(0.0), inputs, targets)  # which also clips
    _, gradients = trainer.gradients(Tensor(inputs), Tensor(targets))
    ours = {name: gradient.numpy() for name, gradient in gradients.items()}
    length = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in ours.values()))
    expected = theirs.gradients()
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        clipped = gradient * min(1.0, TINY.grad_clip / length)
        # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
        scale = 1.0 if name.endswith("k_proj.bias") else np.abs(expected[name]).max()
        np.testing.assert_allclose(clipped, expected[name], atol=1e-4 * scale, err_msg=name)
