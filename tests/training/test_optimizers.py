from __future__ import annotations

import math

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt.training.optimizers import Optimizer, StepInputs, global_norm, orthogonal
from tinygpt.training.schedule import scheduled

SHAPES = {"wte.weight": (7, 4), "blocks.0.mlp.c_fc.weight": (8, 4), "ln_f.weight": (4,)}


def draw(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def run(optimizer: Optimizer, gradients: list[dict[str, np.ndarray]], rates, good=True) -> dict:
    for update, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        tensors = {name: Tensor(value) for name, value in gradient.items()}
        inputs = StepInputs.of(Tensor(optimizer.inputs(rate, 2 * rate, update).array()))
        Tensor.realize(*optimizer.updates(tensors, global_norm(tensors), inputs, Tensor(good)))
    return {name: parameter.numpy() for name, parameter in optimizer.parameters.items()}


def parameters() -> dict[str, Tensor]:
    return {name: Tensor(value).realize() for name, value in draw(0).items()}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_equals_pytorch(clip):
    torch = pytest.importorskip("torch")
    gradients, rates = (
        [draw(i, 10.0 ** (i - 3)) for i in range(1, 7)],
        [0.1 / i for i in range(1, 7)],
    )
    found = run(Optimizer(parameters(), "adamw", 0.8, 0.95, 0.3, clip), gradients, rates)

    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in draw(0).items()}
    matrices = [p for p in theirs.values() if p.ndim == 2]
    groups = [
        {"params": matrices, "weight_decay": 0.3},
        {"params": [theirs["ln_f.weight"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    for gradient, rate in zip(gradients, rates, strict=True):
        for name, value in gradient.items():
            theirs[name].grad = torch.tensor(value)
        if clip:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_equals_pytorch_for_block_matrices_and_leaves_the_rest_to_adamw():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.importorskip("torch.optim.muon")
    name = "blocks.0.mlp.c_fc.weight"
    gradients, rates = [draw(i) for i in range(1, 5)], [0.01] * 4
    found = run(Optimizer(parameters(), "muon", 0.9, 0.95, 0.1), gradients, rates)
    by_adamw = run(Optimizer(parameters(), "adamw", 0.9, 0.95, 0.1), gradients, rates)
    for other in ("wte.weight", "ln_f.weight"):
        np.testing.assert_allclose(found[other], by_adamw[other], rtol=1e-6)

    theirs = torch.nn.Parameter(torch.tensor(draw(0)[name]))
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient[name])
        optimizer.step()
    moved = theirs.detach().numpy() - draw(0)[name]
    # PyTorch iterates in bfloat16, which has eight bits
    np.testing.assert_allclose(found[name] - draw(0)[name], moved, atol=0.03 * np.abs(moved).max())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_orthogonal_brings_singular_values_near_one(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = orthogonal(Tensor(matrix)).numpy()
    before, after = (np.linalg.svd(m, compute_uv=False) for m in (matrix, found))
    assert before.max() / before.min() > 3
    assert after.min() > 0.6
    assert after.max() < 1.3
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    assert (found * (u @ v)).sum() > 0.95 * np.linalg.norm(found) * np.linalg.norm(u @ v)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_step_changes_nothing(kind):
    optimizer = Optimizer(parameters(), kind)
    before = run(optimizer, [draw(1)], [0.1])
    state = {name: value.numpy() for name, value in optimizer.state.items()}
    bad = draw(2)
    bad["wte.weight"][0, 0] = math.nan
    after = run(optimizer, [bad], [0.1], good=False)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    for name, value in optimizer.state.items():
        np.testing.assert_array_equal(value.numpy(), state[name])


def test_the_schedules():
    def rates(schedule):
        return [scheduled(step, 10, 4, schedule, 1.0, 0.1) for step in range(12)]

    assert rates("constant") == [0.2, 0.4, 0.6, 0.8] + [1.0] * 8
    linear = [0.2, 0.4, 0.6, 0.8] + [1 - 0.9 * i / 6 for i in range(6)] + [0.1, 0.1]
    np.testing.assert_allclose(rates("linear"), linear)
    cosine = rates("cosine")
    assert cosine[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert cosine[7] == pytest.approx(0.55)  # half-way
    assert cosine[10:] == pytest.approx([0.1, 0.1])
    assert cosine[4:11] == sorted(cosine[4:11], reverse=True)
    assert scheduled(0, 5, 0, "cosine", 1.0, 0.1) == 1.0  # no warm-up
