"""Each fast form against its plain one, over shapes that fit no tile, and against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import CLANG, NARROW, SMALL, needs_clang, randomize
from tinygpt.ops.fused import token_losses
from tinygrad import Device, Tensor, Variable
from tinygrad.nn.state import get_parameters
from tinygrad.runtime.support.compiler_cpu import ClangJITCompiler

from tinygpt import GPT, Generator, sampling
from tinygpt.checkpoints.quantization import convert, supported
from tinygpt.ops.fast import fast, linear, matmul

# M, K, N: one, few rows, tiles and their edges, odd primes, more than one block of each size.
SHAPES = [(1, 1, 1), (1, 7, 5), (8, 16, 3), (9, 17, 67), (13, 31, 37), (245, 259, 33)]
RAGGED = {
    "plain": {},
    "odd sizes": {"n_embd": 21, "n_head": 3, "n_inner": 37},
    "wide heads": {"n_embd": 36, "n_head": 2, "n_inner": 9},
    "one narrow head": {"n_embd": 1, "n_head": 1},
    "post-norm": {"norm": "post"},
    "no bias": {"bias": False},
    "no shortcut": {"shortcut": False},
    "post-norm without bias": {"norm": "post", "bias": False, "n_embd": 21, "n_head": 3},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "waves, an output of its own": {"position": "sinusoidal", "tie_word_embeddings": False},
    "in several kernels": {"n_layer": 5},
    "scaled": {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 0.1},
}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_the_fast_forms_hold_where_clang_compiles_for_the_cpu(monkeypatch):
    x = Tensor.ones(2, 2, device="CPU")
    assert fast(x) == CLANG
    assert not fast(x, Tensor.ones(2, 2, device="PYTHON"))
    monkeypatch.setenv("TINYGPT_KERNELS", "0")
    assert not fast(x)


@needs_clang
@pytest.mark.parametrize("batch", [(), (3, 2)])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_and_its_gradients_are_those_of_numpy(shape, transposed, batch):
    M, K, N = shape
    a, b, d = draw(*batch, M, K), draw(*batch, K, N), draw(*batch, M, N, seed=1)
    turned = [np.swapaxes(m, -1, -2) if t else m for m, t in zip((a, b), transposed, strict=True)]
    x, y = (Tensor(np.ascontiguousarray(m)) for m in turned)
    product = matmul(x, y, *transposed)
    dx, dy = (product * Tensor(d)).sum().gradient(x, y)
    assert close(matmul(x, y, *transposed), a @ b)
    for gradient, true, t in ((dx, d @ np.swapaxes(b, -1, -2), transposed[0]),
                              (dy, np.swapaxes(a, -1, -2) @ d, transposed[1])):  # fmt: skip
        assert close(gradient, np.swapaxes(true, -1, -2) if t else true)


def close(result: Tensor, true: np.ndarray) -> bool:
    return np.allclose(result.numpy(), true, rtol=1e-4, atol=1e-4 * np.abs(true).max())


@pytest.mark.backend
@pytest.mark.parametrize(("rows", "out"), [((1,), 67), ((2, 4), 64), ((3, 5), 131)])
def test_a_linear_layer_is_that_of_numpy(rows, out):
    x, weight, bias = draw(*rows, 19), draw(out, 19), draw(out)
    assert close(linear(Tensor(x), Tensor(weight), Tensor(bias)), x @ weight.T + bias)
    assert close(linear(Tensor(x), Tensor(weight)), x @ weight.T)


@needs_clang
@pytest.mark.parametrize(("batch", "time", "padded"), [(1, 1, 0), (1, 9, 0), (3, 1, 1), (3, 5, 1)])
@pytest.mark.parametrize("options", RAGGED.values(), ids=RAGGED)
def test_reading_equals_its_plain_form(options, batch, time, padded, monkeypatch):
    config = replace(SMALL, **{"n_layer": 1, **options})
    monkeypatch.setattr("tinygpt.ops.reading._MOST_LAYERS", 2)
    model, tokens = randomize(GPT(config)), np.arange(batch * time).reshape(batch, time)
    old = draw(2, batch, config.n_head, 16, config.head_dim)
    results = []
    for kernels in "10":
        monkeypatch.setenv("TINYGPT_KERNELS", kernels)
        cache = [tuple(Tensor(part).realize() for part in old) for _ in range(config.n_layer)]
        padding = Tensor(np.arange(batch, dtype=np.int32) * 2).realize() if padded else None
        start_pos = Variable("start_pos", 0, 15).bind(6)
        ids = Tensor(tokens.astype(np.int32))
        y = model.read(ids, cache, start_pos, padding, end=time // 2)
        results.append([y.numpy(), *(part.numpy() for part in cache[-1])])
    for got, true in zip(*results, strict=True):
        assert np.allclose(got, true, rtol=1e-4, atol=1e-4)
    assert not np.allclose(results[0][1], old[0])  # new keys were written


@needs_clang
@pytest.mark.parametrize("time", [1, 9])
@pytest.mark.parametrize("dtype", NARROW)
def test_reading_with_narrow_weights_equals_its_plain_form(dtype, time, monkeypatch):
    config = replace(SMALL, n_layer=1, n_embd=42, n_inner=37)
    model = convert(randomize(GPT(config)), dtype)
    results = []
    for kernels in "10":
        monkeypatch.setenv("TINYGPT_KERNELS", kernels)
        start_pos = Variable("start_pos", 0, 15).bind(0)
        tokens = Tensor(np.arange(time, dtype=np.int32).reshape(1, time))
        results.append(model.read(tokens, model.empty_cache(1, 16), start_pos, end=0).numpy())
    assert np.allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.backend
@pytest.mark.parametrize("rows", [1, 5, 9])
def test_a_linear_layer_of_narrow_weights_is_that_of_numpy(rows):
    x, true, scale = draw(rows, 37), draw(67, 37), np.abs(draw(67))
    for weight in (
        true.astype(np.float16),
        (true * 10).astype(np.int8),
        (true.view(np.uint32) >> 16).astype(np.uint16),  # bfloat16, cut off
    ):
        if weight.dtype == np.float16 and not supported("float16"):
            continue
        wide = weight.astype(np.float32)
        if weight.dtype == np.uint16:
            wide = (weight.astype(np.uint32) << 16).view(np.float32)
        y = linear(Tensor(x), Tensor(weight), scale=Tensor(scale))
        assert close(y, x @ wide.T * scale)


@needs_clang
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (3, 71), (2, 5003)])
def test_a_threshold_is_found_as_in_plain_tensors(shape, monkeypatch):
    order = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    order[:, ::3] = order[:, :1]  # ties
    for weights, target in (
        (np.ones(shape, np.float32), np.array([shape[1] // 2 + 1], np.int32)),
        (np.abs(draw(*shape)), np.array([shape[1] / 3], np.float32)),
        (np.ones(shape, np.float32), np.array([10**6], np.int32)),  # out of reach
    ):
        found = []
        for kernels in "10":
            monkeypatch.setenv("TINYGPT_KERNELS", kernels)
            args = (Tensor(order), Tensor(weights), Tensor(target))
            found.append(sampling._threshold(*args).numpy())
        assert np.array_equal(*found)


@needs_clang
@pytest.mark.parametrize("shape", [(64, 512, 640), (640, 512, 64), (31, 512, 7), (3, 512, 640)])
@pytest.mark.parametrize("transposed", [(False, True), (True, False)])
def test_any_number_of_threads_gives_the_same(shape, transposed, monkeypatch):
    M, K, N = shape
    a, b = draw(M, K), draw(K, N)
    turned = [np.swapaxes(m, -1, -2) if t else m for m, t in zip((a, b), transposed, strict=True)]
    results = []
    for threads in (1, 2, 9):
        monkeypatch.setattr("tinygpt.ops.fast.count_threads", lambda *_, n=threads: n)
        results.append(matmul(*(Tensor(np.ascontiguousarray(m)) for m in turned), *transposed))
    results = [result.numpy() for result in results]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    assert np.allclose(results[0], a @ b, atol=1e-3)


@needs_clang
def test_the_c_compiles_for_other_processors_and_calls_nothing(monkeypatch):
    compiler, sources = Device["CPU"].compiler, []
    usual = compiler.compile_cached
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile_cached", lambda text: sources.append(text) or usual(text))
        # of a shape that no other test has, so that nothing of it is compiled yet
        config = replace(SMALL, n_embd=40, n_inner=24)
        for dtype in ("float32", "int8"):
            list(Generator(convert(GPT(config), dtype)).generate([1] * 9, 2, seed=0, top_k=3))
        model, ids = GPT(config), Tensor(np.zeros((2, 10), np.int32)).realize()
        loss = token_losses(model, ids, ids).sum()
        Tensor.realize(*loss.gradient(*get_parameters(model)))
    sources = [text for text in sources if "ENTRY" in text]
    for kind in ("read", "threshold", "block", "block_back", "head_back", "embed"):
        assert any(f"ENTRY void {kind}_" in text for text in sources)
    for processor in ("arm64,apple-m1", "x86_64,x86-64-v2", "x86_64,icelake-server"):
        for text in sources:
            ClangJITCompiler(processor.split(",")).compile(text)  # fails at a name from outside
