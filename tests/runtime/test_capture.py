"""Captured steps: the values of the function itself, from memory, from disk, and on threads."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import pickle
import pkgutil
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit, UOp, Variable, dtypes, helpers
from tinygrad.engine.jit import JitError
from tinygrad.helpers import Context
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

import tinygpt
from tinygpt import GPT, Generator, GPTConfig, layers, ops, session
from tinygpt.generator import _idle
from tinygpt.runtime import as_written, buffers, compiling, disk_cache, graph, step_store
from tinygpt.runtime.capture import capture

needs_runner = pytest.mark.skipif(graph.missing() is not None, reason=str(graph.missing()))


def tensor(values, device=None) -> Tensor:
    return Tensor(np.array(values, np.float32), device=device).realize()


class Model:
    """A matrix, and a row of a cache that each step writes."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weight = tensor(rng.normal(size=(8, 8)))
        self.cache = tensor(np.zeros((6, 8)))

    def named(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "cache": self.cache}

    def step(self, x: Tensor, at: UOp) -> Tensor:
        y = (x @ self.weight).tanh().contiguous()
        self.cache[at : at + 1].assign(y.reshape(1, 8)).realize()
        return self.cache.sum(0) + y.reshape(8)


def place(value: int) -> UOp:
    return Variable("at", 0, 5).bind(value)


def plain_step(model: Model, x: np.ndarray, cache_: np.ndarray, at: int) -> np.ndarray:
    y = np.tanh(x @ model.weight.numpy())
    cache_[at] = y
    return cache_.sum(0) + y


def check(step, model: Model, turns: int = 4) -> None:
    rng = np.random.default_rng(1)
    expected = model.cache.numpy().copy()
    for turn in range(turns):
        x = rng.normal(size=8).astype(np.float32)
        got = step(tensor(x), place(turn)).numpy()
        np.testing.assert_allclose(got, plain_step(model, x, expected, turn), rtol=2e-5, atol=1e-5)


def test_it_is_what_the_function_is():
    model = Model()
    check(capture(model.step), model)


@needs_runner
def test_the_origin_is_told():
    model = Model()
    step = capture(model.step)
    assert step.origin is None
    check(step, model)
    assert step.origin == "captured"
    assert "kernels" in step.graph.describe()


@pytest.mark.parametrize("settings", [{"JIT": 0}, {"JIT": 2}, {"DEBUG": 0}])
def test_with_tinygrads_own_ways_it_is_the_same(settings, monkeypatch):
    if settings == {"DEBUG": 0}:
        monkeypatch.setenv("TINYGPT_GRAPH", "0")
    with Context(**settings):
        model = Model()
        step = capture(model.step)
        check(step, model)
        assert step.origin == "tinygrad"
        assert step.graph is None


def test_tensors_in_lists_views_and_several_results():
    def step(pair, bias):
        a, b = pair
        return {"sum": (a + b + bias).realize(), "both": [(a * 2).realize(), (b - a).realize()]}

    captured = capture(step)
    for turn in range(3):
        a, b = tensor([[turn, 2], [3, 4]]), tensor([[5, turn], [1, 1]])
        bias = tensor(np.arange(6)).reshape(3, 2)[1:].transpose()
        found = captured([a, b], bias=bias)
        want = a.numpy() + b.numpy() + np.arange(6, dtype=np.float32).reshape(3, 2)[1:].T
        np.testing.assert_array_equal(found["sum"].numpy(), want)
        np.testing.assert_array_equal(found["both"][0].numpy(), 2 * a.numpy())
        np.testing.assert_array_equal(found["both"][1].numpy(), b.numpy() - a.numpy())


def test_a_result_may_be_given_back_as_an_input():
    step = capture(lambda x: ((x + 1).contiguous() * x + (x + 1).sum()).realize())
    x, want = tensor([1, 2, 3]), np.array([1, 2, 3], np.float32)
    for _ in range(4):
        x = step(x)
        want = (want + 1) * want + (want + 1).sum()
        np.testing.assert_allclose(x.numpy(), want, rtol=1e-6)
        x = x if want.max() < 1e3 else tensor([1, 2, 3])
        want = x.numpy()


def test_an_input_may_be_what_the_step_holds():
    held = tensor([1, 2, 3, 4])

    def step(x):
        doubled = (x * 2).contiguous()
        held.assign(held + doubled).realize()
        return (x + held).realize()

    captured = capture(step)
    captured(tensor([0, 0, 0, 1]))
    got = captured(held).numpy()  # x is then the very memory that is added to
    np.testing.assert_array_equal(held.numpy(), [3, 6, 9, 18])
    np.testing.assert_array_equal(got, [6, 12, 18, 36])


@needs_runner
def test_what_does_not_fit_is_refused():
    step = capture(lambda x, n: (x * n).realize())
    step(tensor([1, 2]), 3)
    with pytest.raises(JitError):
        step(tensor([1, 2, 3]), 3)
    with pytest.raises(JitError):
        step(Tensor([1, 2]).realize(), 3)
    both = capture(lambda a, b: (a + b).realize())
    x = tensor([1, 2])
    both(x, tensor([1, 2]))
    with pytest.raises(JitError):
        both(x, x)
    with pytest.raises(JitError):
        both(x)


@needs_runner
def test_another_constant_is_refused():
    step = capture(lambda x, n: (x * n).realize())
    step(tensor([1, 2]), 3)
    with pytest.raises(JitError):
        step(tensor([1, 2]), 4)


@needs_runner
def test_a_step_within_a_step_is_refused():
    inner = capture(lambda x: (x + 1).realize())
    inner(tensor([1]))
    fresh = capture(lambda x: (x + 1).realize())
    for step in (inner, fresh):
        outer = capture(lambda x, step=step: step(x))
        with pytest.raises(JitError):
            outer(tensor([1]))
    np.testing.assert_array_equal(inner(tensor([4])).numpy(), [5])


def test_a_function_that_fails_can_be_captured_later():
    broken = [True]

    def step(x):
        if broken:
            raise ValueError("not yet")
        return (x + 1).realize()

    captured = capture(step)
    with pytest.raises(ValueError, match="not yet"):
        captured(tensor([1]))
    broken.clear()
    np.testing.assert_array_equal(captured(tensor([1])).numpy(), [2])


def sizes_kernel(out: UOp, x: UOp) -> UOp:
    """C with two numbers behind its variables: they are no variables, but sizes."""

    class Sizes(ProgramInfo):
        def vals(self, var_vals):
            return (*super().vals(var_vals), 3, -7)

    core = UOp.variable("core_id", 0, 1, dtypes.int)
    times = UOp.variable("times", 0, 9, dtypes.int)
    source = (
        "void sized(float *out, const float *x, int core_id, int times, int add, int more) {"
        " for (int i = core_id; i < 4; i += 2) out[i] = x[i] * times + add + more; }"
    )
    sink = UOp.sink(out, x, core, times, arg=KernelInfo("sized"))
    info = Sizes("sized", (2, 1, 1), None, (core, times), (0, 1), (0,), (1,))
    order = UOp(Ops.LINEAR, src=(out, x, core, times))
    text = UOp(Ops.SOURCE, arg=source)
    return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.DEVICE, arg="CPU"), order, text), arg=info)


@needs_runner
def test_a_kernel_may_take_constants_behind_its_variables():
    def step(x, times):
        out = Tensor.empty(4)
        made = UOp.custom_kernel(out.uop, x.uop, fxn=sizes_kernel)
        return (Tensor(made[0]) + times * 0).realize()

    captured = capture(step)
    for times in (2, 5):
        got = captured(tensor([1, 2, 3, 4]), Variable("times", 0, 9).bind(times))
        np.testing.assert_array_equal(got.numpy(), np.array([1, 2, 3, 4]) * times - 4)
    assert captured.origin == "captured"


@needs_runner
def test_several_devices_and_copies_between_them():
    devices = ("CPU:0", "CPU:1", "CPU:2", "CPU:3")
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(16, 16)).astype(np.float32) for _ in range(2))
    a = Tensor(first).shard(devices, axis=0).realize()
    b = Tensor(second).shard(devices, axis=1).realize()

    def step(x):
        hidden = (x @ a.transpose()).relu().contiguous()
        return (x + hidden @ b.transpose()).contiguous().realize()

    captured = capture(step)
    for _ in range(3):
        x = rng.normal(size=(3, 16)).astype(np.float32)
        got = captured(Tensor(x).shard(devices).realize()).numpy()
        want = x + np.maximum(x @ first.T, 0) @ second.T
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert captured.origin == "captured"
    names = [call.name for call in captured.graph.calls]
    assert "copy" in names


@needs_runner  # tinygrad by itself lets no other thread use a device while it compiles
def test_ten_threads_each_with_a_step_of_their_own():
    models = [Model(number) for number in range(10)]
    weights = [model.weight.numpy() for model in models]
    steps = [
        capture(lambda x, m=m, n=n: (x @ m.weight + n).realize()) for n, m in enumerate(models)
    ]
    errors = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                x = np.full((2, 8), turn, np.float32)
                got = buffers.read(steps[number](buffers.tensor(x))).reshape(2, 8)
                want = x @ weights[number] + number
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    run_threads(work, 10)
    assert not errors


@needs_runner
def test_one_step_from_ten_threads():
    weight = tensor(np.arange(64).reshape(8, 8) / 64)
    expected = weight.numpy()
    step = capture(lambda x: ((x @ weight).contiguous() * 2).realize())
    step(tensor(np.zeros((1, 8))))
    errors = []

    def work(number: int) -> None:
        try:
            for turn in range(50):
                x = np.full((1, 8), 100 * number + turn, np.float32)
                got = buffers.read(step(buffers.tensor(x)))
                np.testing.assert_allclose(got, 2 * (x @ expected)[0], rtol=1e-5)
        except BaseException as error:
            errors.append(error)

    run_threads(work, 10)
    assert not errors


def run_threads(work, count: int) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@needs_runner  # tinygrad by itself lets no other thread use a device while it compiles
def test_what_another_thread_computes_meanwhile_is_no_part_of_the_step():
    found = []

    def step(x):
        thread = threading.Thread(target=lambda: found.append((tensor([1, 2]) + 3).realize()))
        thread.start()
        thread.join()
        return (x * 2).realize()

    captured = capture(step)
    for turn in range(2):
        np.testing.assert_array_equal(captured(tensor([turn])).numpy(), [2 * turn])
    assert len(found) == 1
    np.testing.assert_array_equal(found[0].numpy(), [4, 5])


@pytest.fixture
def collecting():
    """Two threads that collect garbage again and again."""
    gc.freeze()  # what there is already need not be looked at each time
    stop = threading.Event()

    def collect() -> None:
        while not stop.wait(0.02):
            gc.collect()

    threads = [threading.Thread(target=collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


def test_generators_can_be_dropped_while_another_goes_on(model, collecting):
    """A captured graph that Python collects in tinygrad's worker thread must not wait there."""
    keep = Generator(model, chunk_size=4)
    want = list(keep.generate([1, 2, 3], 4, temperature=0))
    for i in range(200):
        dropped = Generator(model, chunk_size=4)
        if i % 20 == 0:  # capturing is what takes the time
            assert list(dropped.generate([1, 2, 3], 2, temperature=0)) == want[:2]
        dropped.myself = dropped
        assert list(keep.generate([1, 2, 3], 4, temperature=0)) == want


@pytest.mark.slow
def test_captured_steps_can_be_dropped_in_cycles(collecting):
    keep = capture(lambda x: (x + 1).realize())
    for i in range(200):
        dropped = capture(lambda x, i=i % 3: ((x * i).contiguous() + x).realize())
        dropped.myself = dropped
        dropped(tensor([1]))
        np.testing.assert_array_equal(keep(tensor([i])).numpy(), [i + 1])


def test_a_captured_step_lets_its_function_go():
    model = Model()
    step = capture(model.step)
    check(step, model)
    assert step._function is None


# What is kept on disk.


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "CACHEDB", str(tmp_path / "cache.db"))
    monkeypatch.delenv("TINYGPT_STORE", raising=False)


def run_kept(key: object = "step", seed: int = 0, model: Model | None = None) -> str:
    model = model or Model(seed)
    step = capture(model.step, model.named, key)
    check(step, model)
    return step.origin


def entries() -> list[str]:
    with disk_cache._connect() as connection:
        query = f"SELECT key FROM '{step_store.TABLE}_{helpers.VERSION}'"
        return [key for (key,) in connection.execute(query)]


@needs_runner
def test_a_step_is_found_again(kept):
    assert run_kept() == "captured"
    assert run_kept(seed=1) == "stored"  # with weights of its own


@needs_runner
def test_no_weights_are_kept(kept):
    model = Model()
    run_kept(model=model)
    (key,) = entries()
    assert model.weight.numpy()[0].tobytes() not in disk_cache.read(step_store.TABLE, key)


@needs_runner
def test_another_key_shape_or_setting_is_another_step(kept, monkeypatch):
    assert run_kept("one") == "captured"
    assert run_kept("two") == "captured"
    monkeypatch.setenv("TINYGPT_SOMETHING", "1")
    assert run_kept("one") == "captured"
    monkeypatch.delenv("TINYGPT_SOMETHING")
    with Context(NOOPT=1 - helpers.NOOPT.value):
        assert run_kept("one") == "captured"
    assert run_kept("one") == "stored"
    other = Model()
    other.weight = tensor(np.eye(8)).transpose()  # the same shape, lying otherwise
    assert run_kept("one", model=other) == "captured"
    tied = Model()
    tied.named = lambda: {"weight": tied.weight, "cache": tied.cache, "more": tied.weight}
    assert run_kept("one", model=tied) == "captured"


@needs_runner
def test_a_step_of_what_another_process_would_not_know_is_not_kept(kept, monkeypatch):
    """A class or function from elsewhere, or one that was replaced, has no lasting name."""

    class Elsewhere(GPT):
        def logits(self, x):
            return -super().logits(x)

    def first_step(model) -> tuple[set[str], list[int]]:
        generator = Generator(model)
        ids = list(generator.generate([1, 2, 3], max_new_tokens=4, temperature=0))
        steps = _idle[model][True]._session._steps.values()
        return {step.origin for step in steps}, ids

    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50)
    _, usual = first_step(GPT(config))
    assert first_step(GPT(config)) == ({"stored"}, usual)
    origin, other = first_step(Elsewhere(config))
    assert origin == {"captured"}
    assert other != usual
    scaled = GPT(config)
    scaled.blocks[0].attn.heads = ops.Heads(2, 30.0)
    assert first_step(scaled)[0] == {"captured"}
    usual_logits = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda model, x: -usual_logits(model, x))
    assert first_step(GPT(config)) == ({"captured"}, other)
    monkeypatch.undo()
    monkeypatch.setattr(step_store, "_IMPORTED", 0.0)  # as if files had changed since
    assert first_step(GPT(config)) == ({"captured"}, usual)


class Negated:
    """A descriptor in the place of a method."""

    def __get__(self, owner, kind=None):
        return lambda x: -x


REPLACED = {
    "a special method": (layers.LayerNorm, "__call__", lambda self, x: -x),
    "another's method": (layers.LayerNorm, "__call__", layers.Embedding.__call__),
    "a descriptor": (layers.LayerNorm, "__call__", Negated()),
    "a method that was not there": (layers.LayerNorm, "__getattribute__", lambda *a: a),
    "a property": (GPT, "_unembedding", property(lambda self: (self.wte.weight, None))),
    "an operation": (ops, "activation", lambda x, kind: -x),
    "the C form of one": (ops.fast, "activation", lambda x, kind: -x),
    "a function that is imported": (session, "pick", lambda *given: given),
    "a function in part": (layers, "project", functools.partial(layers.project)),
}


@needs_runner
@pytest.mark.parametrize("what", REPLACED)
def test_a_step_of_code_that_was_replaced_is_not_kept(what, kept, monkeypatch):
    owner, name, value = REPLACED[what]
    assert run_kept() == "captured"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value, raising=False)
        assert run_kept() == "captured"
    assert run_kept() == "stored"


def test_all_code_of_the_package_is_as_written():
    for module in pkgutil.walk_packages(tinygpt.__path__, "tinygpt."):
        if not module.name.endswith("__main__"):
            served = module.name.startswith("tinygpt.server")
            # Where the extra is not installed, nothing of what needs it can run.
            with suppress(ModuleNotFoundError) if served else nullcontext():
                importlib.import_module(module.name)
    assert as_written.constants_of_code() is not None


@needs_runner
def test_a_number_at_the_top_of_what_computes_makes_another_step(kept, monkeypatch):
    assert run_kept() == "captured"
    monkeypatch.setattr(ops.fast, "_FEW_ROWS", 3)
    assert [run_kept(), run_kept()] == ["captured", "stored"]


@needs_runner
def test_the_store_can_be_turned_off(kept, monkeypatch):
    monkeypatch.setenv("TINYGPT_STORE", "0")
    assert run_kept() == "captured"
    assert run_kept() == "captured"


@needs_runner
def test_a_tensor_without_a_name_keeps_a_step_from_the_disk(kept):
    for _ in range(2):
        model = Model()
        step = capture(model.step, {"weight": model.weight}, "key")
        check(step, model)
        assert step.origin == "captured"


@needs_runner
def test_values_that_a_function_writes_into_memory_itself_are_not_taken_for_results(kept):
    def step(x):
        return (x + buffers.tensor(np.array([5, 6], np.float32))).realize()

    for _ in range(2):
        captured = capture(step, {}, "key")
        np.testing.assert_array_equal(captured(tensor([1, 2])).numpy(), [6, 8])
        assert captured.origin == "captured"


@needs_runner
@pytest.mark.parametrize("cut", ["half", "bit", "other", "foreign", "type", "empty"])
def test_a_damaged_or_foreign_entry_is_made_anew(kept, cut):
    assert run_kept() == "captured"
    (key,) = entries()
    good = disk_cache.read(step_store.TABLE, key)
    if cut == "other":  # a good entry of another step
        run_kept("another")
        good = disk_cache.read(step_store.TABLE, next(k for k in entries() if k != key))
    damaged = {
        "half": good[: len(good) // 2],
        "bit": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "other": good,
        "foreign": b"x" * 500,
        "type": {"a": 1},
        "empty": b"",
    }[cut]
    disk_cache.write(step_store.TABLE, key, damaged)
    assert run_kept() == "captured"
    assert run_kept() == "stored"


@needs_runner
def test_an_entry_must_fit_what_it_is_found_for(kept):
    """Even one with the right digests: names, sizes and types are compared."""
    model = Model()
    assert run_kept(model=model) == "captured"
    (key,) = entries()
    plan = step_store.load(key)
    for field, value in {
        "name": "other",
        "size": 3,
        "dtype": dtypes.int,
        "device": "CPU:1",
    }.items():
        named = next(i for i, s in enumerate(plan.storages) if s.name == "weight")
        storages = list(plan.storages)
        storages[named] = storages[named]._replace(**{field: value})
        step_store.save(key, plan._replace(storages=tuple(storages)))
        assert run_kept() == "captured", field
    step_store.save(key, pickle.dumps("no plan"))
    assert run_kept() == "captured"


@needs_runner
def test_a_damaged_cache_is_done_without(kept):
    with open(helpers.CACHEDB, "wb") as file:
        file.write(b"this is no database" * 100)
    assert run_kept() == "captured"
    assert run_kept() == "captured"


@needs_runner
def test_nothing_is_compiled_twice_without_a_cache(monkeypatch):
    compiled = []
    compiler = type(compiling.Device["CPU"].compiler)
    real = compiler.compile
    monkeypatch.setattr(compiler, "compile", lambda self, s: compiled.append(s) or real(self, s))
    with Context(CACHELEVEL=0):
        for _ in range(2):
            compiling.to_program_cache.clear()
            model = Model()
            check(capture(model.step), model)
    own = [text for text in compiled if "void" in text]
    assert len(own) == len(set(own))


@needs_runner
def test_a_later_process_finds_the_step(kept, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_capture as t;"
        "print(t.run_kept(seed=3))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, os.path.dirname(__file__)]
    environment = os.environ | {"CACHEDB": helpers.CACHEDB}
    found = [
        subprocess.run(
            command, capture_output=True, env=environment, encoding="utf-8"
        ).stdout.strip()
        for _ in range(2)
    ]
    assert found == ["captured", "stored"]


@needs_runner
def test_a_step_within_a_tinyjit_is_refused_by_name():
    step = capture(lambda x: (x + 1).realize())
    step(tensor([1.0, 2.0]))
    outer = TinyJit(lambda x: step(x) + x)
    outer.cnt = 1  # so that it captures now
    with pytest.raises(JitError, match="while a TinyJit captures"):
        outer(tensor([1.0, 2.0]))
