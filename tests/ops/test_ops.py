"""Each operation in C against its plain form, with gradients, over shapes that fit no vector."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
from conftest import needs_clang
from operations import operations
from tinygrad import Tensor, UOp, Variable, dtypes
from tinygrad.dtype import DType
from tinygrad.runtime.support.compiler_cpu import ClangJITCompiler

from tinygpt.ops import fast, plain
from tinygpt.ops.plain import Dropout, Heads
from tinygpt.runtime import launch

pytestmark = needs_clang
Array = np.ndarray
# Sizes that neither 8 nor 16 divides: one, a few, and more than a block.
WIDTHS = (1, 5, 8, 21, 259)
THREADS = (1, 3)  # the C forms are held equal with one, and with several of uneven shares
HOLDS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def hold(values: Array, dtype: str) -> Array:
    """Numbers as a weight of that dtype is held."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return (values * (30 if dtype == "int8" else 1)).astype(HOLDS[dtype])


def tensors(given: dict[str, Array | None]) -> dict[str, Tensor | None]:
    made = {name: None if a is None else Tensor(a, device="CPU") for name, a in given.items()}
    Tensor.realize(*[tensor for tensor in made.values() if tensor is not None])
    return made


@contextmanager
def threads(most: int) -> Iterator[None]:
    """As many threads for each call as it can be shared out to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "count_threads", lambda _, limit=most: max(1, min(most, limit)))
        yield


def forms() -> Iterator[ModuleType]:
    """The plain form, then that in C with each number of threads."""
    yield plain
    for most in THREADS:
        with threads(most):
            yield fast


def hold_equal(name: str, given: dict[str, Array | None], by: tuple[str, ...] = (), *, atol=2e-5,
               **others) -> None:  # fmt: skip
    """All forms of an operation give the same numbers, and the same gradients by some arguments."""
    results = []
    for form in forms():
        args = tensors(given)
        y = getattr(form, name)(**args, **others)
        share = Tensor(draw(*y.shape, seed=9), device="CPU")
        found = {"result": y}
        if by:
            gradients = (y * share).sum().gradient(*[args[n] for n in by])
            found |= dict(zip(by, gradients, strict=True))
        Tensor.realize(*found.values())
        results.append({name: tensor.numpy() for name, tensor in found.items()})
    for part, true in results[0].items():
        size = max(1.0, np.nanmax(np.abs(true), initial=0.0))
        for other in results[1:]:
            np.testing.assert_allclose(other[part], true, atol=atol * size, err_msg=part)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 21, 67), (7, 259, 8), (16, 21, 37), (17, 21, 37), (70, 37, 67), (270, 259, 33)],
)
def test_linear(shape):
    M, K, N = shape
    given = {"x": draw(M, K), "weight": draw(N, K), "bias": draw(N), "scale": None}
    given["residual"] = draw(M, N)
    hold_equal("linear", given, ("x", "weight", "bias", "residual"))


@pytest.mark.parametrize("absent", ["bias", "residual"])
def test_linear_without_what_may_be_absent(absent):
    given = {"x": draw(2, 9, 21), "weight": draw(37, 21), "bias": draw(37), "scale": None}
    given = given | {"residual": draw(2, 9, 37)} | {absent: None}
    hold_equal("linear", given, tuple(n for n in given if given[n] is not None))


@pytest.mark.parametrize("M", [1, 3, 16, 17])
@pytest.mark.parametrize("dtype", HOLDS)
def test_linear_of_narrow_weights(M, dtype):
    given = {"x": draw(M, 53), "weight": hold(draw(67, 53), dtype), "bias": draw(67)}
    scale = np.abs(draw(67)) if dtype == "int8" else None
    hold_equal("linear", given | {"scale": scale, "residual": draw(M, 67)})


@pytest.mark.parametrize("batch", [(), (3, 2)])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 7, 5), (245, 259, 33)])
def test_matmul(shape, a_transposed, b_transposed, batch):
    M, K, N = shape
    a = draw(*batch, *((K, M) if a_transposed else (M, K)))
    b = draw(*batch, *((N, K) if b_transposed else (K, N)))
    hold_equal("matmul", {"a": a, "b": b}, ("a", "b"), a_transposed=a_transposed,
               b_transposed=b_transposed)  # fmt: skip


@pytest.mark.parametrize("kind", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("size", [1, 7, 8, 1003])
def test_activation(kind, size):
    hold_equal("activation", {"x": 3 * draw(size)}, ("x",), kind=kind)


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(C, bias):
    R = C % 7 + 1
    given = {"x": 2 * draw(R, C) + 1, "weight": draw(C), "bias": draw(C, seed=1) if bias else None}
    by = tuple(name for name in given if given[name] is not None)
    hold_equal("layer_norm", given, by, epsilon=0.1 if C == 1 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("C", WIDTHS)
def test_embedding(C):
    ids = np.array([[0, 5, 5], [66, 2, 0]], np.int32)
    hold_equal("embedding", {"ids": ids, "table": draw(67, C), "scale": None}, ("table",))


@pytest.mark.parametrize("dtype", HOLDS)
def test_embedding_of_narrow_weights(dtype):
    ids = np.array([[0, 5, 5], [66, 2, -1], [67, 10**9, -(2**31)]], np.int32)
    table = hold(draw(67, 21), dtype)
    hold_equal("embedding", {"ids": ids, "table": table, "scale": np.abs(draw(67))})


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 7, 3, 5), (1, 71, 2, 21), (3, 33, 1, 8), (1, 140, 2, 4)]
)
def test_attention(shape, rate):
    B, T, H, D = shape
    given = {name: draw(B, T, H * D, seed=i) for i, name in enumerate("qkv")}
    dropout, heads = key_of(rate, stride=3) if rate else None, Heads(H, 0.4)
    results = []
    for form in forms():
        args = tensors(given)
        if form is plain:
            y = plain.attention(*args.values(), heads, None, 0, None, None, dropout)
        else:
            y = fast.attention(*args.values(), heads, dropout)
        share = Tensor(draw(B, T, H * D, seed=9), device="CPU")
        gradients = (y * share).sum().gradient(*args.values())
        results.append([tensor.numpy() for tensor in (y, *gradients)])
    for true, *others in zip(*results, strict=True):
        for got in others:
            np.testing.assert_allclose(got, true, atol=5e-5 * max(1, np.abs(true).max()))


@pytest.mark.parametrize(("T", "row"), [(1, None), (5, None), (12, 7), (70, None)])
@pytest.mark.parametrize("start", ["number", "variable", "own", "own, in slots"])
def test_attention_with_a_cache(T, row, start):
    B, H, D, S = 2, 3, 7, 90
    slots = [3, 1] if start == "own, in slots" else None
    C, M, heads = H * D, T if row is None else 1, Heads(H, 0.4)
    q, k, v = draw(B, M, C), draw(B, T, C, seed=1), draw(B, T, C, seed=2)
    old = draw(2, 4 if slots else B, H, S, D)
    where: int | UOp | Tensor = 6
    results = []
    for form in forms():
        args = tensors({"q": q, "k": k, "v": v})
        cache = tuple(Tensor(part, device="CPU").contiguous().realize() for part in old)
        rows = Tensor(np.array(slots, np.int32), device="CPU").realize() if slots else None
        column = row
        if start == "variable":
            where = Variable("start_pos", 0, S - T).bind(6)
            column = None if row is None else Variable("row", 0, T - 1).bind(row)
        elif start.startswith("own"):
            where = Tensor(np.array([6, 11], np.int32), device="CPU").realize()
        if form is plain:
            y = plain.attention(*args.values(), heads, cache, where, rows, column, None)
        else:
            y = fast.attention_cached(*args.values(), heads, cache, where, rows, column)
        results.append([y.numpy(), *(part.numpy() for part in cache)])
    for true, *others in zip(*results, strict=True):
        for got in others:
            np.testing.assert_allclose(got, true, atol=2e-5)
    changed = (results[0][1] != old[0]).any((1, 2, 3))  # where new keys were written
    assert np.flatnonzero(changed).tolist() == sorted(slots or [0, 1])


@pytest.mark.parametrize("T", [3, 12])
@pytest.mark.parametrize("start", [-1, 0, 4, 10, 16, 10**8])
def test_a_row_that_reaches_past_the_cache_is_none_and_harms_no_other(start, T):
    B, S, heads = 2, 16, Heads(2, 0.4)
    q, k, v = (draw(B, T, 6, seed=i) for i in range(3))
    old = draw(2, B, 2, S, 3)
    for form in forms():
        args = tensors({"q": q, "k": k, "v": v})
        cache = tuple(Tensor(part, device="CPU").contiguous().realize() for part in old)
        where = Tensor(np.array([start, 2], np.int32), device="CPU").realize()
        if form is plain:
            y = plain.attention(*args.values(), heads, cache, where, None, None, None)
        else:
            y = fast.attention_cached(*args.values(), heads, cache, where, None, None)
        y = y.numpy()
        fits = 0 <= start <= S - T
        assert np.isfinite(y[1]).all()
        assert np.isfinite(y[0]).all() == fits
        for part, was in zip(cache, old, strict=True):
            assert np.array_equal(part.numpy()[0], was[0]) == (not fits)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 67)])
def test_cross_entropy(shape):
    R, C = shape
    targets = np.arange(R, dtype=np.int32)
    given = {"x": draw(2, R, C), "weight": draw(71, C), "targets": np.stack([targets, targets + 5])}
    hold_equal("cross_entropy", given | {"scale": None}, ("x", "weight"))


@pytest.mark.parametrize("dtype", HOLDS)
def test_cross_entropy_of_narrow_weights(dtype):
    targets = np.array([3, -1, 0, 71, 70], np.int32)
    given = {"x": draw(5, 33) / 9, "weight": hold(draw(71, 33), dtype), "targets": targets}
    hold_equal("cross_entropy", given | {"scale": np.abs(draw(71))}, atol=1e-4)


def key_of(
    rate: float, place: int = 3, first_row: int = 0, step: int = 5, stride: int = 1
) -> Dropout:
    key = Tensor(np.array([1337, step, first_row, stride], np.uint32), device="CPU").realize()
    return Dropout(rate, place, key)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 67)])
def test_dropout(shape):
    given = {"x": draw(*shape), "residual": draw(*shape, seed=1)}
    hold_equal("dropout", given, ("x", "residual"), dropout=key_of(0.3, first_row=4, stride=3))


def test_optimiser_steps():
    inputs = np.array([0.1, 0.2, 0.7, 0.5, 1.0], np.float32)
    results = []
    for form in forms():
        found = []
        for size in (1, 7, 1000):
            state = [Tensor(draw(size, seed=i) ** 2, device="CPU").realize() for i in range(3)]
            gradient = Tensor(draw(size, seed=4), device="CPU").realize()
            for good in (1.0, 0.0):
                inputs[4] = good
                given = Tensor(inputs, device="CPU").realize()
                form.adamw(*state, gradient, given, 0.1, (0.9, 0.95))
                Tensor.realize(*state)
            found += [tensor.numpy() for tensor in state]
        several = [Tensor(draw(size), device="CPU") for size in (1, 15, 16, 1000)]
        results.append([*found, form.sum_of_squares(several).numpy()])
    for true, *others in zip(*results, strict=True):
        for got in others:
            np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (3, 71), (2, 5003)])
def test_threshold(shape):
    order = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    order[:, ::3] = order[:, :1]  # ties
    for weights, target in (
        (np.ones(shape, np.float32), np.array([shape[1] // 2 + 1], np.int32)),
        (np.abs(draw(*shape)), np.array([shape[1] / 3], np.float32)),
        (np.ones(shape, np.float32), np.array([10**6], np.int32)),  # out of reach
    ):
        args = [Tensor(array, device="CPU") for array in (order, weights, target)]
        found = [form.threshold(*args).numpy() for form in (plain, fast)]
        assert np.array_equal(*found)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 71, 5003])
def test_gumbel(size):
    seeds = Tensor(np.array([0, 35, 2**64 - 1], np.uint64), device="CPU")
    draws = Tensor(np.array([3, 0, 2**31 - 1], np.int32), device="CPU")
    found = [form.gumbel(seeds, draws, size).numpy() for form in (plain, fast)]
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-6)


def test_dropout_drops_its_share_and_no_two_places_alike():
    x = Tensor.ones(64, 1000, device="CPU")
    masks = {
        (place, step): fast.dropout(x, key_of(0.3, place=place, step=step), None).numpy()
        for place in (0, 1)
        for step in (0, 1)
    }
    for mask in masks.values():
        assert set(np.unique(mask)) == {0.0, np.float32(1 / 0.7)}
        assert abs((mask == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / mask.size) ** 0.5
    for one, other in itertools.combinations(masks.values(), 2):
        agree = ((one == 0) == (other == 0)).mean()
        assert abs(agree - (0.3**2 + 0.7**2)) < 0.01


def test_a_row_is_dropped_alike_in_whichever_batch_it_stands():
    x = Tensor(draw(6, 50), device="CPU").realize()
    whole = fast.dropout(x, key_of(0.5), None).numpy()
    part = fast.dropout(x[4:].contiguous(), key_of(0.5, first_row=4), None).numpy()
    np.testing.assert_array_equal(part, whole[4:])
    odd = fast.dropout(x[1::2].contiguous(), key_of(0.5, first_row=1, stride=2), None).numpy()
    np.testing.assert_array_equal(odd, whole[1::2])


def test_threads_are_as_many_as_the_work_is_worth(monkeypatch):
    monkeypatch.setattr(fast.device, "cpu_count", lambda: 4)
    for flops, most, count in (
        (0, None, 1), (99_999, None, 1), (100_000, None, 2), (10**9, None, 4),
        (10**9, 3, 3), (10**9, 9, 4), (10**9, 0, 1), (100_000, 1, 1),
    ):  # fmt: skip
        assert fast.count_threads(flops, most) == count


def test_what_each_operation_is_said_to_take_grows_with_its_sizes(monkeypatch):
    """Threads are shared out by it, and a profile shows it."""
    said = {}
    real = launch.call

    def call(file, function, tensors, numbers, threads, flops, *others, **named):
        said[function] = flops, threads
        return real(file, function, tensors, numbers, threads, flops, *others, **named)

    monkeypatch.setattr(launch, "call", call)
    monkeypatch.setattr(fast.device, "cpu_count", lambda: 10**6)
    monkeypatch.setattr(fast, "_THREAD_FLOPS", 1)
    a, b = Tensor.ones(2, 3, 5).contiguous(), Tensor.ones(2, 5, 7).contiguous()
    w, row, ids = Tensor.ones(7, 5).contiguous(), Tensor.ones(5).contiguous(), Tensor([[1, 2, 3]])
    q, cache = Tensor.ones(2, 3, 8).contiguous(), (Tensor.zeros(2, 2, 9, 4).contiguous(),) * 2
    drop, heads = key_of(0.5), Heads(2, 1.0)
    inputs, order = Tensor.ones(5).contiguous(), Tensor.zeros(2, 7, dtype=dtypes.uint32)
    order, seeds = order.contiguous(), Tensor([3, 4], dtype=dtypes.uint64)
    for y, x in (
        (fast.matmul(a, b, False, False), a), (fast.linear(a, w, None, None, None), a),
        (fast.activation(a, "relu"), a), (fast.layer_norm(a, row, row, 1e-5), a),
        (fast.embedding(ids, w, None), w), (fast.attention(q, q, q, heads, None), q),
        (fast.dropout(a, drop, None), a), (fast.sum_of_squares([a, w]), None),
        (fast.cross_entropy(a, w, Tensor([[1, 2, 3]] * 2, dtype=dtypes.int32), None), None),
        (fast.attention_cached(q, q, q, heads, cache, 0, None, None), None),
        (fast.threshold(order, Tensor.ones(2, 7), Tensor([1.0])), None),
        (fast.gumbel(seeds, Tensor([0, 1], dtype=dtypes.int32), 7), None),
    ):  # fmt: skip
        if x is not None:
            y.sum().gradient(x)
    fast.adamw(a, a.contiguous(), a.contiguous(), a.contiguous(), inputs, 0.1, (0.9, 0.9))
    assert said == {
        "matmul": (2 * 2 * 3 * 5 * 7,) * 2,
        "linear": (2 * 6 * 5 * 7,) * 2,
        "linear_backward": (4 * 6 * 5 * 7,) * 2,
        "activation": (20 * 30,) * 2,
        "activation_backward": (20 * 30,) * 2,
        "layer_norm": (10 * 30, 6),  # no more threads than rows
        "layer_norm_backward": (20 * 30, 6),
        "embedding": (3 * 5, 3),
        "embedding_backward": (7 * 5 + 3 * 5, 1),  # of 16 columns a thread
        "attention": (2 * 2 * 3 * 3 * 8, 4),  # no more than heads of texts
        "attention_backward": (4 * 2 * 3 * 3 * 8, 4),
        "attention_few": (2 * 2 * 3 * 9 * 8, 4),
        "dropout": (20 * 30,) * 2,
        "sum_of_squares": (2 * 35,) * 2,
        "cross_entropy": (2 * 6 * 5 * 7, 6),
        "threshold": (64 * 2 * 7, 2),
        "gumbel": (16 * 2 * 7,) * 2,
        "adamw": (16 * 30,) * 2,
    }


def test_a_call_is_held_against_the_c_signature():
    x, weight = Tensor(draw(2, 3), device="CPU"), Tensor(draw(4, 3), device="CPU")
    with pytest.raises(TypeError, match="weight"):
        fast.linear(x, weight.cast(dtypes.float64), None, None, None)
    with pytest.raises(TypeError, match="bias"):
        fast.linear(x, weight, Tensor(np.zeros(4, np.int32), device="CPU"), None, None)
    assert isinstance(x.dtype, DType)


def test_weights_that_are_narrow_or_scaled_have_no_gradients():
    x, ids = Tensor(draw(2, 3), device="CPU"), Tensor([0, 1], dtype=dtypes.int32, device="CPU")
    weight, scale = Tensor(draw(5, 3), device="CPU"), Tensor(draw(5), device="CPU")
    half = weight.half()
    for y in (
        fast.linear(x, half, None, None, None), fast.linear(x, weight, None, scale, None),
        fast.cross_entropy(x, half, ids, None), fast.cross_entropy(x, weight, ids, scale),
        fast.matmul(x, half, False, True),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="has no gradient"):
            y.sum().gradient(x)
    with pytest.raises(AssertionError, match="has no gradient"):
        fast.embedding(ids, half, None).sum().gradient(half)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processor", ["arm64,apple-m1", "x86_64,x86-64-v2", "x86_64,icelake-server"]
)
def test_the_c_compiles_for_other_processors_and_calls_nothing(processor):
    compiler = ClangJITCompiler(processor.split(","))
    assert len(operations()) >= 16
    for file, function in operations():
        parameters = launch.signature(file, function)
        flags = {f"has_{p.name}" for p in parameters if p.pointer}
        fixed = {p.name: 1.5 for p in parameters if p.type == "float" and not p.pointer}
        fixed |= {p.name: 3 for p in parameters if p.name == "few"}
        names = {p.name for p in parameters if not p.pointer} - {"core_id", *fixed}
        macros = (("WEIGHT", "signed char"), ("ACTIVATION", "gelu_tanh"))
        if function.endswith("_backward"):
            macros = (("WEIGHT", "float"), *macros[1:])
        text = launch.program_text(
            file, function, (), tuple(sorted(names | flags)), tuple(fixed.items()), macros
        )
        compiler.compile(text)  # fails at a name from outside
