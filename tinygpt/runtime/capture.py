"""Captured steps: a function of tensors that runs once in Python, and from then on as a table.

`capture` is what tinygrad's TinyJit is, with three differences. The first call captures already,
since the functions here have no state to set up. On the CPU a step runs through `graph.Graph`. And
a step whose long-lived tensors have names is kept on disk, so that a later process need not build,
schedule or compile it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from tinygrad import Device, Tensor, TinyJit, UOp
from tinygrad.engine.jit import (
    CapturedJit,
    JitError,
    _check_no_non_tensor_return,
    graph_split_rewrite,
)
from tinygrad.engine.realize import capturing, run_linear
from tinygrad.helpers import DEBUG, JIT, JIT_BATCH_SIZE, PROFILE, VALIDATE_WITH_CPU, VIZ
from tinygrad.nn.state import get_parameters
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import Ops, buffers

from tinygpt.runtime import graph, launch, step_store, thread_pool
from tinygpt.runtime.compiling import compile_calls
from tinygpt.runtime.plan import Inputs, make_plan
from tinygpt.runtime.replay import Replay
from tinygpt.runtime.stored_step import StoredStep

Named = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]


def capture(
    function: Callable[..., Any], named: Named | None = None, key: object = None
) -> CapturedStep:
    """A function that is captured at its first call, and replayed at each later one.

    The result is the same tensors at each call (of one thread), with new values.

    Args:
        function: of realised tensors, lists of them, bound variables, and constants, to tensors.
        named: every tensor that the function touches, is not given and does not make itself, by
            name; or a function that tells them.
        key: whatever else the step depends on: see `step_store.identity`. With `named` and `key`
            the step is kept on disk.
    """
    return CapturedStep(function, named, key)


def is_capturing() -> bool:
    """Whether what this thread computes now is being captured, so that no value can be looked at.

    A recorder of ours knows its thread; a TinyJit may be of any.
    """
    here = threading.get_ident()
    return bool(capturing) and getattr(capturing[0], "thread", here) == here


class CapturedStep:
    """What `capture` gives."""

    def __init__(self, function: Callable[..., Any], named: Named | None, key: object) -> None:
        # Let go at the capture: it often holds what holds this step, and a cycle would be taken
        # apart in whatever thread Python collects garbage.
        self._function: Callable[..., Any] | None = function
        self._named, self._key = named, key
        self._replay: Replay | _Tinygrad | None = None
        self.origin: str | None = None  # "captured", "stored" or "tinygrad" after the first call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replay = self._replay
        if replay is None:
            with thread_pool.building:
                if self._replay is None:
                    return self._first(args, kwargs)
                replay = self._replay
        return replay(args, kwargs)

    @property
    def graph(self) -> graph.Graph | None:
        """The table of calls, where there is one."""
        return self._replay.graph if isinstance(self._replay, Replay) else None

    @property
    def kernels(self) -> list[str]:
        """The names of what it runs in their order, after the first call."""
        if self._replay is None:
            return []
        if isinstance(self._replay, Replay):
            return [call.name for call in self._replay.plan.calls]
        captured = self._replay.jit.captured
        calls = captured.linear.toposort() if captured else ()
        return [u.src[0].arg.name for u in calls if u.op is Ops.CALL and u.src[0].op is Ops.PROGRAM]

    def _first(self, args: tuple, kwargs: dict) -> Any:
        assert self._function is not None
        origin = "tinygrad"
        if not _takes_graphs():
            replay: Replay | _Tinygrad = _Tinygrad(self._function)
        elif capturing:
            raise JitError("a captured step cannot be called while a TinyJit captures")
        else:
            inputs = Inputs(args, kwargs)
            stored = self._stored(inputs)
            loaded = stored.load(inputs) if stored else None
            replay = loaded or _record(self._function, inputs, stored)
            if isinstance(replay, Replay):
                origin = "stored" if loaded else "captured"
        result = replay(args, kwargs)
        self._replay, self.origin = replay, origin
        self._function = self._named = self._key = None
        return result

    def _stored(self, inputs: Inputs) -> StoredStep | None:
        if self._named is None or self._key is None or not step_store.wanted():
            return None
        named = self._named() if callable(self._named) else self._named
        return StoredStep.of(self._key, named, inputs)


def _takes_graphs() -> bool:
    """Whether settings and machine let a step run as a table, or else tinygrad runs it."""
    if Device.DEFAULT.split(":")[0] != "CPU" or JIT.value != 1:
        return False
    if DEBUG >= 2 or PROFILE or VIZ or VALIDATE_WITH_CPU:  # which look at each kernel
        return False
    return graph.missing() is None


class _Tinygrad:
    """tinygrad's own way to replay, for one thread at a time."""

    def __init__(self, function: Callable[..., Any] | None, captured: CapturedJit | None = None):
        self.jit = TinyJit(function, captured)
        if captured is None:
            self.jit.cnt = 1  # its first call captures

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        with thread_pool.building:
            result = self.jit(*args, **kwargs)
            if self.jit.captured is not None:
                self.jit.fxn = None
            return result


class _Recorder:
    """What tinygrad hands schedules to while a function is captured."""

    def __init__(self) -> None:
        self.calls: list[UOp] = []
        self.thread = threading.get_ident()

    def add_linear(self, linear: UOp, var_vals: dict[str, int]) -> None:
        if threading.get_ident() == self.thread:
            self.calls += linear.src
        else:  # another thread computes something of its own meanwhile
            run_linear(linear, var_vals)


def _record(
    function: Callable[..., Any], inputs: Inputs, stored: StoredStep | None
) -> Replay | _Tinygrad:
    """Run the function in Python once, and make of what it schedules something to replay."""
    older = _known()
    recorder = _Recorder()
    capturing.append(recorder)
    try:
        result = function(*inputs.args, **inputs.kwargs)
        if tensors := get_parameters(result):
            Tensor.realize(*tensors)
    finally:
        capturing.clear()
    if not recorder.calls:
        raise JitError("the function computes nothing that could be captured")
    _check_no_non_tensor_return(result)
    held = _known()
    # What has memory by now was given values outside of the step, which cannot make it anew.
    older |= {u for u in held if u.buffer.is_allocated()}
    for tensor in get_parameters(result):
        held |= {u for u in tensor.uop.toposort() if u.op is Ops.BUFFER}
    params = {u: UOp.param(i, u.dtype, u.shape, u.device) for i, u in enumerate(inputs.uops)}
    linear = UOp(Ops.LINEAR, src=tuple(recorder.calls)).substitute(params, walk=True)
    linear = memory_plan_rewrite(compile_calls(linear, also=[thread_pool.runner_source()]), held)
    names = {**stored.names, **launch.constant_names()} if stored else {}
    found = make_plan(linear, inputs, result, older, names)
    if found is None:
        linear = graph_split_rewrite(linear, max_batch_size=JIT_BATCH_SIZE.value)
        captured: CapturedJit[Any] = CapturedJit(result, linear, inputs.names, inputs.info)
        return _Tinygrad(None, captured)
    plan, uops = found
    if stored and all(plan.storages[i].name or u not in older for i, u in enumerate(uops)):
        stored.save(plan)
    return Replay(plan, inputs, uops, result)


def _known() -> set[UOp]:
    """All BUFFERs with memory, or to have some; another thread may just make one."""
    while True:
        try:
            return set(buffers)
        except RuntimeError:
            continue
