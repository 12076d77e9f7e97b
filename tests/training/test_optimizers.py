from __future__ import annotations

import math

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt.training.lora import Lora
from tinygpt.training.optimizers import Optimizer, StepInputs, global_norm, orthogonal
from tinygpt.training.schedule import scheduled

SHAPES = {
    "wte.weight": (7, 4), "blocks.0.mlp.c_fc.weight": (8, 4), "blocks.0.mlp.c_proj.weight": (3, 5),
    "blocks.0.ln_1.weight": (4,), "ln_f.weight": (4,),
}  # fmt: skip


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


def orthogonal_in_numpy(x: np.ndarray) -> np.ndarray:
    """Jordan et al. 2024, appendix: of a tall matrix the iteration runs on the transpose."""
    if len(x) > len(x[0]):
        return orthogonal_in_numpy(x.T).T
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def run_in_numpy(kind, gradients, rates, beta1, beta2, decay, clip) -> tuple[dict, dict]:
    """Parameters and state in float64, as `run` moves them."""
    weights = {name: value.astype(np.float64) for name, value in draw(0).items()}
    state: dict[str, np.ndarray] = {}
    for update, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        length = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        factor = min(1.0, clip / length) if clip else 1.0
        for name, w in weights.items():
            g = gradient[name] * factor
            pull = decay if w.ndim == 2 else 0.0
            if kind == "muon" and w.ndim == 2 and name != "wte.weight":
                momentum = 0.95 * state.get(f"{name}.momentum", 0.0) + 0.05 * g
                state[f"{name}.momentum"] = momentum
                direction = orthogonal_in_numpy(0.05 * g + 0.95 * momentum)
                stretch = np.sqrt(max(1.0, w.shape[0] / w.shape[1]))
                weights[name] = w - 2 * rate * (pull * w + stretch * direction)
                continue
            mean = beta1 * state.get(f"{name}.mean", 0.0) + (1 - beta1) * g
            square = beta2 * state.get(f"{name}.square", 0.0) + (1 - beta2) * g**2
            state |= {f"{name}.mean": mean, f"{name}.square": square}
            root = np.sqrt(square / (1 - beta2**update)) + 1e-8
            weights[name] = w - rate * (pull * w + mean / (1 - beta1**update) / root)
    return weights, state


@pytest.mark.parametrize("kernels", ["1", "0"])
@pytest.mark.parametrize(("kind", "clip"), [("adamw", 0.5), ("muon", 0.5), ("muon", 0.0)])
def test_weights_and_state_equal_numpy(kind, clip, kernels, monkeypatch):
    """In C and in plain tensors, whatever compiler there is."""
    monkeypatch.setenv("TINYGPT_KERNELS", kernels)
    gradients = [draw(i, 10.0 ** (i - 3)) for i in range(1, 5)]
    rates = [0.1 / i for i in range(1, 5)]
    optimizer = Optimizer(parameters(), kind, 0.8, 0.95, 0.3, clip)
    found = run(optimizer, gradients, rates)
    weights, state = run_in_numpy(kind, gradients, rates, 0.8, 0.95, 0.3, clip)
    assert optimizer.state.keys() == state.keys()
    state_found = {name: value.numpy() for name, value in optimizer.state.items()}
    for ours, expected, atol in ((found, weights, 5e-5), (state_found, state, 1e-7)):
        for name, value in expected.items():
            np.testing.assert_allclose(ours[name], value, rtol=3e-5, atol=atol, err_msg=name)


def test_what_is_not_given_is_as_documented():
    gradients, rates = [draw(1, 9.0), draw(2, 9.0)], [0.1, 0.1]
    found = run(Optimizer(parameters()), gradients, rates)
    weights, _ = run_in_numpy("adamw", gradients, rates, 0.9, 0.95, 0.1, 0.0)
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value, rtol=3e-5, atol=3e-6)
    inputs = Optimizer(parameters()).inputs(0.5, 0.25, 2)
    expected = [0.5, 0.5 / (1 - 0.9**2), math.sqrt(1 - 0.95**2), 0.25, 1.0]
    np.testing.assert_allclose(inputs.array(), expected, rtol=1e-6)


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_lora_follows_the_chain_rule(kernels, monkeypatch):
    """Gradients to numbers of their own: AdamW would hide a factor."""
    monkeypatch.setenv("TINYGPT_KERNELS", kernels)
    lora, given = Lora(parameters(), 2, 3.0, seed=5), draw(4)
    assert set(lora.targets) == {n for n in SHAPES if "mlp" in n}
    for number, (name, parameter) in enumerate(lora.parameters.items()):
        value, (rows, columns) = parameter.numpy(), parameter.shape
        if name.endswith("lora_a"):
            assert rows == 2
            assert 0.7 < np.abs(value).max() * columns**0.5 <= 1
            assert value.min() < 0 < value.max()
        else:
            assert columns == 2
            assert not value.any()
        drawn = np.random.default_rng(number).standard_normal(parameter.shape)
        parameter.assign(Tensor(drawn.astype(np.float32))).realize()
    found = lora.gradients({name: Tensor(value) for name, value in given.items()})
    Tensor.realize(*lora.merge())
    for name, weight in lora.targets.items():
        a, b = (lora.parameters[f"{name}.lora_{part}"].numpy() for part in "ab")
        np.testing.assert_allclose(
            weight.numpy(), draw(0)[name] + 1.5 * b @ a, rtol=1e-5, atol=1e-5
        )
        by = found[f"{name}.lora_a"].numpy(), found[f"{name}.lora_b"].numpy()
        for one, other in zip(by, (1.5 * b.T @ given[name], 1.5 * given[name] @ a.T), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert set(lora.tensors) == {
        f"{name}.{part}" for name in lora.targets for part in ("lora_a", "lora_b", "base")
    }


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
        {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
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


def test_muon_equals_pytorch():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.importorskip("torch.optim.muon")
    name = "blocks.0.mlp.c_fc.weight"
    gradients, rates = [draw(i) for i in range(1, 5)], [0.01] * 4
    found = run(Optimizer(parameters(), "muon", 0.9, 0.95, 0.1), gradients, rates)
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
    tiny = orthogonal(Tensor(matrix * np.float32(1e-9))).numpy()
    assert (tiny * (u @ v)).sum() > 0
    assert not orthogonal(Tensor(0 * matrix)).numpy().any()


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
    last = [scheduled(step, 1, 0, "linear", 1.0, 0.1) for step in (0, 1)]
    assert last == [1.0, pytest.approx(0.1)]  # of a single step
    assert scheduled(3, 3, 3, "linear", 1.0, 0.1) == 1.0  # all of them warm-up
