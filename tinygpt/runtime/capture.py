"""Captured steps: a function of tensors that runs once in Python, and from then on as a table.

`capture` is what tinygrad's TinyJit is, with three differences. The first call captures already,
since the functions here have no state to set up. On the CPU a step runs through `graph.Graph`. And
a step whose long-lived tensors have names is kept on disk, so that a later process need not build,
schedule or compile it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp
from tinygrad.device import Buffer, MultiBuffer
from tinygrad.dtype import DType
from tinygrad.engine.jit import (
    CapturedJit,
    JitError,
    _check_no_non_tensor_return,
    _prepare_jit_inputs,
    graph_split_rewrite,
)
from tinygrad.engine.realize import (
    _resolve,
    capturing,
    estimate_uop,
    get_call_arg_uops,
    run_linear,
    unwrap_multi,
)
from tinygrad.helpers import (
    DEBUG,
    JIT,
    JIT_BATCH_SIZE,
    PROFILE,
    VALIDATE_WITH_CPU,
    VIZ,
    GlobalCounters,
)
from tinygrad.nn.state import get_parameters
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import Ops, buffers

from tinygpt.runtime import graph, launch, store
from tinygpt.runtime.compiling import compile_calls
from tinygpt.runtime.graph import Access, Call

Named = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]

# tinygrad notes what is captured in one list for the whole process.
_capturing = threading.RLock()


def _after_fork() -> None:
    global _capturing
    _capturing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def capture(
    function: Callable[..., Any], named: Named | None = None, key: object = None
) -> CapturedStep:
    """A function that is captured at its first call, and replayed at each later one.

    The result is the same tensors at each call (of one thread), with new values.

    Args:
        function: of realised tensors, lists of them, bound variables, and constants, to tensors.
        named: every tensor that the function touches, is not given and does not make itself, by
            name; or a function that tells them.
        key: whatever else the step depends on, as its `repr` tells it. With `named` and `key` the
            step is kept on disk.
    """
    return CapturedStep(function, named, key)


class Storage(NamedTuple):
    """Memory that a step touches: a buffer, or one on each of several devices."""

    device: str | tuple[str, ...]
    size: int  # elements
    dtype: DType
    name: str | None = None  # of the tensor that it belongs to; without one, it is made anew


class Output(NamedTuple):
    """A tensor of the result: tinygrad's view of the storages, each as a PARAM of its number."""

    view: UOp


class Plan(NamedTuple):
    """A captured step as plain data, with no tensor's values in it.

    Buffers are numbered through: those of the inputs, then those of the other storages, each
    storage with as many as it has devices.
    """

    inputs: tuple[Storage, ...]
    storages: tuple[Storage, ...]
    calls: tuple[Call, ...]
    binaries: tuple[bytes, ...]
    result: Any  # tensors as Output
    private: tuple[int, ...]  # storages of the result that nobody else knows


class CapturedStep:
    """What `capture` gives."""

    def __init__(self, function: Callable[..., Any], named: Named | None, key: object) -> None:
        # Let go at the capture: it often holds what holds this step, and a cycle would be taken
        # apart in whatever thread Python collects garbage.
        self._function: Callable[..., Any] | None = function
        self._named, self._key = named, key
        self._replay: _Replay | _Tinygrad | None = None
        self.origin: str | None = None  # "captured", "stored" or "tinygrad" after the first call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replay = self._replay
        if replay is None:
            with _capturing:
                if self._replay is None:
                    return self._first(args, kwargs)
                replay = self._replay
        return replay(args, kwargs)

    @property
    def graph(self) -> graph.Graph | None:
        """The table of calls, where there is one."""
        return self._replay.graph if isinstance(self._replay, _Replay) else None

    @property
    def kernels(self) -> list[str]:
        """The names of what it runs in their order, after the first call."""
        if self._replay is None:
            return []
        if isinstance(self._replay, _Replay):
            return [call.name for call in self._replay.plan.calls]
        captured = self._replay.jit.captured
        calls = captured.linear.toposort() if captured else ()
        return [u.src[0].arg.name for u in calls if u.op is Ops.CALL and u.src[0].op is Ops.PROGRAM]

    def _first(self, args: tuple, kwargs: dict) -> Any:
        assert self._function is not None
        if not _takes_graphs():
            replay: _Replay | _Tinygrad = _Tinygrad(self._function)
            result = replay(args, kwargs)
        else:
            if capturing:
                raise JitError("a captured step cannot be called while another is captured")
            inputs = _Inputs(args, kwargs)
            stored = self._stored(inputs)
            replay = stored.load(inputs) if stored else None
            self.origin = "stored"
            if replay is None:
                replay = _record(self._function, inputs, stored)
                self.origin = "captured"
            result = replay(args, kwargs)
        if isinstance(replay, _Tinygrad):
            self.origin = "tinygrad"
        self._replay, self._named = replay, None
        self._function = None
        return result

    def _stored(self, inputs: _Inputs) -> _Stored | None:
        if self._named is None or self._key is None or not store.wanted():
            return None
        named = self._named() if callable(self._named) else self._named
        return _Stored.of(self._key, named, inputs)


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
        with _capturing:
            result = self.jit(*args, **kwargs)
            if self.jit.captured is not None:
                self.jit.fxn = None
            return result


class _Inputs:
    """What a step was given, as tinygrad's JIT looks at it."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.args, self.kwargs = args, kwargs
        self.uops, self.values, self.names, self.info = _prepare_jit_inputs(args, kwargs)
        given = [*enumerate(args), *sorted(kwargs.items())]
        simple = (bool, int, float, str, bytes, type(None))
        self.constants = tuple((name, x) for name, x in given if isinstance(x, simple))
        self.bound = tuple((name, x.src[0].arg) for name, x in given if isinstance(x, UOp))
        # Containers of tensors are looked into, as the JIT does.
        known = (*simple, UOp, Tensor, list, tuple, dict)
        self.plain = all(isinstance(x, known) for _, x in given)
        self.shapes = tuple((name, _shape_of(x)) for name, x in given)

    @property
    def storages(self) -> tuple[Storage, ...]:
        return tuple(Storage(u.device, u.arg, u.dtype) for u in self.uops)


def _shape_of(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.shape
    if isinstance(given, dict):
        return {name: _shape_of(x) for name, x in given.items()}
    return [_shape_of(x) for x in given] if isinstance(given, (list, tuple)) else None


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
    function: Callable[..., Any], inputs: _Inputs, stored: _Stored | None
) -> _Replay | _Tinygrad:
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
    for tensor in get_parameters(result):
        held |= {u for u in tensor.uop.toposort() if u.op is Ops.BUFFER}
    params = {u: UOp.param(i, u.dtype, u.shape, u.device) for i, u in enumerate(inputs.uops)}
    linear = UOp(Ops.LINEAR, src=tuple(recorder.calls)).substitute(params, walk=True)
    linear = memory_plan_rewrite(compile_calls(linear, also=[graph.runner_source()]), held)
    names = {**stored.names, **launch.constant_names()} if stored else {}
    found = _plan(linear, inputs, result, older, names)
    if found is None:
        linear = graph_split_rewrite(linear, max_batch_size=JIT_BATCH_SIZE.value)
        captured = CapturedJit(result, linear, inputs.names, inputs.info)
        return _Tinygrad(None, captured)
    plan, uops = found
    if stored and all(plan.storages[i].name or u not in older for i, u in enumerate(uops)):
        stored.save(plan)
    return _Replay(plan, inputs, uops, result)


def _known() -> set[UOp]:
    """All BUFFERs with memory, or to have some; another thread may just make one."""
    while True:
        try:
            return set(buffers)
        except RuntimeError:
            continue


def _buffers(uop: UOp) -> list[Buffer]:
    """The buffer of each device."""
    buffer = uop.buffer
    return list(buffer.bufs) if isinstance(buffer, MultiBuffer) else [buffer]


def _plan(
    linear: UOp, inputs: _Inputs, result: Any, older: set[UOp], names: Mapping[UOp, str]
) -> tuple[Plan, list[UOp]] | None:
    """The captured calls as a plan, and the storages' BUFFERs; None where a table cannot run them.

    Args:
        linear: compiled, with the inputs as PARAMs.
        older: BUFFERs that were there before the capture.
        names: of BUFFERs.
    """
    uops: list[UOp] = []  # of storages
    numbers: dict[int, tuple[int, int]] = {}  # (buffer, offset) by the id of tinygrad's Buffer
    given: list[dict[int, tuple[int, int]]] = []  # the same of each input
    count = 0
    for uop in inputs.uops:
        given.append({})
        for buffer in _buffers(uop):
            given[-1][id(buffer.base)] = count, buffer.offset
            count += 1
    seen = set()
    outputs = [u for t in get_parameters(result) for u in t.uop.toposort() if u.op is Ops.BUFFER]
    arguments = [u for call in linear.src for arg in call.src[1:] for u in arg.toposort()]
    for uop in [*arguments, *outputs]:
        if uop.op is Ops.BUFFER and uop not in seen and uop not in inputs.uops:
            seen.add(uop)
            uops.append(uop)
            for buffer in _buffers(uop):
                numbers[id(buffer.base)] = count, buffer.offset
                count += 1
    calls: list[Call] = []
    binaries: dict[bytes, int] = {}
    for call in linear.src:
        ast = call.src[0]
        if ast.op is Ops.BUFFER_VIEW:  # its memory is a part of another's already
            continue
        found = get_call_arg_uops(call)
        devices = [
            d for u in found for d in ([u.device] if isinstance(u.device, str) else u.device)
        ]
        if ast.op not in (Ops.PROGRAM, Ops.COPY) or not all(
            d.split(":")[0] == "CPU" for d in devices
        ):
            return None
        resolved = [_resolve(u, tuple(inputs.uops)) for u in found]
        of = [given[p[0]] if (p := _param(u)) else numbers for u in found]
        work = estimate_uop(call)
        work = float(sum(getattr(x, "vmax", x) for x in (work.ops, work.mem)))
        for parts, fixed in unwrap_multi(call, resolved):
            if ast.op is Ops.COPY:
                accesses = _accesses((0, 1), (0,), (1,), parts, of)
                values: tuple[int | str | None, ...] = (accesses[0].size,)
                calls.append(Call("copy", -1, accesses, values, 1, work))
                continue
            info = ast.arg
            accesses = _accesses(info.globals, info.outs, info.ins, parts, of)
            known = {v.expr: 0 for v in info.vars} | fixed
            constants = info.vals(known)[len(info.vars) :]
            own = (
                None if v.expr in info.runtimevars else fixed.get(v.expr, v.expr) for v in info.vars
            )
            threads = int((info.global_size or (1,))[0])
            number = binaries.setdefault(ast.src[4].arg, len(binaries))
            values = (*own, *(int(x) for x in constants))
            if threads > graph.MOST_THREADS:
                return None
            calls.append(Call(info.function_name, number, accesses, values, threads, work))
    order = {u: i for i, u in enumerate([*inputs.uops, *uops])}
    plan = Plan(
        inputs.storages,
        tuple(Storage(u.device, u.arg, u.dtype, names.get(u)) for u in uops),
        tuple(calls),
        tuple(binaries),
        _map(result, lambda tensor: Output(_as_params(tensor.uop, order))),
        tuple(i for i, u in enumerate(uops) if u in outputs and u not in older and u not in names),
    )
    return plan, uops


def _param(uop: UOp) -> tuple[int] | None:
    """The number of the input that an argument is a part of."""
    return next(((u.arg,) for u in uop.toposort() if u.op is Ops.PARAM), None)


def _accesses(
    places: Sequence[int],
    outs: Sequence[int],
    ins: Sequence[int],
    parts: Sequence[Buffer],
    of: Sequence[Mapping[int, tuple[int, int]]],
) -> tuple[Access, ...]:
    found = []
    for i in places:
        buffer, start = of[i][id(parts[i].base)]
        writes, offset = i in outs, parts[i].offset - start
        found.append(Access(buffer, offset, parts[i].nbytes, i in ins or not writes, writes))
    return tuple(found)


def _map(result: Any, change: Callable[[Any], Any]) -> Any:
    """The result with each of its tensors changed, in the same containers."""
    if isinstance(result, dict):
        return {name: _map(x, change) for name, x in result.items()}
    if isinstance(result, (list, tuple)) and not isinstance(result, Output):
        items = [_map(x, change) for x in result]
        if isinstance(result, list):
            return items
        return type(result)(*items) if hasattr(result, "_fields") else tuple(items)
    return None if result is None else change(result)


def _as_params(uop: UOp, order: Mapping[UOp, int]) -> UOp:
    found = [u for u in uop.toposort() if u.op is Ops.BUFFER]
    return uop.substitute({u: UOp.param(order[u], u.dtype, (u.arg,), u.device) for u in found})


def _as_tensors(result: Any, uops: Sequence[UOp]) -> Any:
    """A plan's result over storages, the inputs' first."""

    def made(output: Output) -> Tensor:
        found = [u for u in output.view.toposort() if u.op is Ops.PARAM]
        return Tensor(output.view.substitute({u: uops[u.arg] for u in found}))

    return _map(result, made)


class _Result(NamedTuple):
    """What a step returns to one thread, and where its memory is."""

    tensors: Any
    uops: list[UOp]
    addresses: list[tuple[int, int]]  # (buffer, address)


class _Replay:
    """A plan with memory: runs it with the inputs and variables that it is given."""

    def __init__(self, plan: Plan, inputs: _Inputs, uops: list[UOp], result: Any) -> None:
        """
        Args:
            inputs: of the first call; later ones must be like them.
            uops: the BUFFER of each storage.
            result: the tensors to return, over these.
        """
        self.plan, self.uops = plan, uops
        self.names, self.info, self.constants = inputs.names, inputs.info, inputs.constants
        # The memory of the first inputs is used for no longer than this: each call brings its own.
        parts = [[b.ensure_allocated() for b in _buffers(u)] for u in (*inputs.uops, *uops)]
        self._first_of: list[int] = []  # the number of each storage's first buffer
        addresses: list[int] = []
        for storage in parts:
            self._first_of.append(len(addresses))
            addresses += [buffer._buf.va_addr for buffer in storage]
        self._count = sum(len(storage) for storage in parts[: len(inputs.uops)])
        loaded = [graph.load(binary, "step") for binary in plan.binaries]
        functions = [address for _, address in loaded]
        functions.append(graph.memcpy())  # a copy is call number -1
        self.graph = graph.Graph(
            plan.calls, functions, addresses, self._count, (loaded, parts[len(inputs.uops) :])
        )
        names = {b.device for storage in parts for b in storage}
        self._devices = [Device[name] for name in sorted(names)]
        self._variables = frozenset(self.graph.variables)
        self._sizes = [b.nbytes for storage in parts for b in storage]
        self._only_written = _only_written(plan.calls, len(addresses))
        self._measure()
        self._simple = self._simple_inputs(inputs)
        self._copies: dict[int, UOp] = {}
        self._careful = False
        own = self._addresses_of(uops, plan.private)
        self._result = _Result(result, uops, own)
        self._results = threading.local()
        self._results.result = self._result

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        found = self._addresses(args) if self._simple is not None and not kwargs else None
        if found is None:
            found = self._addresses_at_length(args, kwargs)
        addresses, values, keep = found
        result = getattr(self._results, "result", None) or self._new_result()
        table = self.graph
        with graph.running:
            if capturing and capturing[0].thread == threading.get_ident():
                raise JitError("a captured step cannot be called while another is captured")
            for device in self._devices:
                _finish(device)
            moved = result is not self._result
            if moved:
                for buffer, address in result.addresses:
                    table.set_address(buffer, address)
                self._result = result
                self._measure()
            if moved or self._copies or addresses != table.addresses[: self._count]:
                keep = self._place(addresses), keep
            for name in self._variables:
                table.set_variable(name, values[name])
            table.run(self._careful)
        GlobalCounters.kernel_count += 1
        del keep
        return result.tensors

    def _simple_inputs(self, inputs: _Inputs) -> list[tuple] | None:
        """What each tensor must be like, where all are whole buffers that are given one by one."""
        expected: list[tuple] = []
        for position, given in enumerate(inputs.args):
            if isinstance(given, Tensor):
                if (buffer := _whole(given.uop)) is None or not isinstance(given.device, str):
                    return None
                expected.append((position, given.shape, given.dtype, buffer.arg, given.device))
            elif isinstance(given, (list, tuple, dict)):
                return None
        return expected if not inputs.kwargs else None

    def _addresses(self, args: tuple) -> tuple[list[int], dict[str, int], Any] | None:
        """Addresses of the inputs and values of variables, or None for a look at length."""
        values: dict[str, int] = {}
        addresses, expected, at = [], self._simple, 0
        for position, given in enumerate(args):
            if given.__class__ is UOp:
                if given.op is not Ops.BIND:
                    return None
                values[given.src[0].arg[0]] = given.src[1].arg
            elif given.__class__ is Tensor:
                uop = given.uop
                if at == len(expected) or (buffer := _whole(uop)) is None:
                    return None
                like = position, uop.shape, uop.dtype, buffer.arg, buffer.src[1].arg
                if like != expected[at]:
                    return None
                memory = buffers.get(buffer)
                if memory is None or not memory.is_initialized():
                    return None
                addresses.append(memory._buf.va_addr)
                at += 1
        if at != len(expected) or len(set(addresses)) != at or self._variables - values.keys():
            return None
        for position, constant in self.constants:
            if args[position] != constant:
                return None
        return addresses, values, args

    def _addresses_at_length(
        self, args: tuple, kwargs: dict
    ) -> tuple[list[int], dict[str, int], Any]:
        """The same, by tinygrad's own look at what is given.

        Raises:
            JitError: where it is not like what was given at first.
        """
        with _capturing:
            inputs = _Inputs(args, kwargs)
        if inputs.names != self.names or inputs.info != self.info:
            raise JitError(f"the step was captured with {self.info}, not {inputs.info}")
        if inputs.constants != self.constants:
            raise JitError(f"the step was captured with {self.constants}, not {inputs.constants}")
        if missing := self._variables - inputs.values.keys():
            raise JitError(f"the step needs values for {sorted(missing)}")
        for storage, expected in zip(inputs.storages, self.plan.inputs, strict=True):
            if storage != expected:
                raise JitError(f"the step was captured with {expected}, not {storage}")
        parts = [b.ensure_allocated() for u in inputs.uops for b in _buffers(u)]
        return [b._buf.va_addr for b in parts], inputs.values, parts

    def _place(self, addresses: list[int]) -> list[Any]:
        """Put the inputs' addresses into the table, and look for memory that overlaps.

        What the step writes before it reads it, such as its last result, is copied first, when it
        is given as an input. Other overlaps have the calls run one by one.

        Returns:
            What must be kept until the step has run.
        """
        kept, careful = [], False
        self._copies = {}
        for i, address in enumerate(addresses):
            size = self._sizes[i]
            over = (self._starts < address + size) & (address < self._ends)
            if over.any():
                if self._fresh[over].any():
                    copied = np.empty(size + 64, np.uint8)
                    at = (copied.ctypes.data + 63) // 64 * 64
                    graph.copy_bytes(at, address, size)
                    kept.append(copied)
                    address = at
                    self._copies[i] = copied
                else:
                    careful = True
            self.graph.set_address(i, address)
        spans = sorted(zip(addresses, self._sizes, strict=False))
        careful |= any(a + size > b for (a, size), (b, _) in pairwise(spans))
        self._careful = careful
        return kept

    def _measure(self) -> None:
        """Note where the memory is that an input might overlap."""
        starts = self.graph.addresses[self._count :]
        self._starts = np.array(starts, np.int64)
        self._ends = self._starts + np.array(self._sizes[self._count :], np.int64)
        self._fresh = np.array(self._only_written[self._count :], bool)

    def _addresses_of(self, uops: list[UOp], storages: Sequence[int]) -> list[tuple[int, int]]:
        found = []
        for i in storages:
            first = self._first_of[len(self.plan.inputs) + i]
            for lane, buffer in enumerate(_buffers(uops[i])):
                found.append((first + lane, buffer.ensure_allocated()._buf.va_addr))
        return found

    def _new_result(self) -> _Result:
        """Tensors of its own for another thread, which may read them while the first runs on."""
        uops, plan = list(self.uops), self.plan
        for i in plan.private:
            storage = plan.storages[i]
            uops[i] = UOp.new_buffer(storage.device, storage.size, storage.dtype)
        if any(u.arg < len(plan.inputs) for u in _params(plan.result)):
            return self._result  # it gives an input back
        filler = [uops[0]] * len(plan.inputs)
        tensors = _as_tensors(plan.result, [*filler, *uops])
        result = _Result(tensors, uops, self._addresses_of(uops, plan.private))
        self._results.result = result
        return result


def _params(result: Any) -> list[UOp]:
    found: list[UOp] = []
    _map(
        result, lambda output: found.extend(u for u in output.view.toposort() if u.op is Ops.PARAM)
    )
    return found


def _whole(uop: UOp) -> UOp | None:
    """The BUFFER that a tensor is all of, in whatever shape."""
    if uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return uop if uop.op is Ops.BUFFER else None


def _only_written(calls: Sequence[Call], count: int) -> list[bool]:
    """Which buffers some call writes without reading them: what tinygrad's JIT copies when it is
    given as an input."""
    found = [False] * count
    for call in calls:
        for access in call.accesses:
            found[access.buffer] |= access.writes and not access.reads
    return found


# How far each device's own queue was known to have come, by the device. Used with `running` held.
_finished: dict[Any, int] = {}


def _finish(device: Any) -> None:
    """Wait until a device has done what tinygrad has queued for it."""
    value = device.timeline_value
    if _finished.get(device) != value:
        device.synchronize()
        _finished[device] = value


class _Stored:
    """Where a step is kept on disk, and the tensors that it names."""

    def __init__(self, digest: str, named: dict[str, UOp]) -> None:
        self.digest, self.named = digest, named
        self.names: dict[UOp, str] = {}
        for name, uop in named.items():
            self.names.setdefault(uop, name)

    @classmethod
    def of(cls, key: object, named: Mapping[str, Tensor], inputs: _Inputs) -> _Stored | None:
        """None where a tensor is no view of just one buffer, or an argument is no plain value."""
        if not inputs.plain:
            return None
        bases: dict[str, UOp] = {}
        first: dict[UOp, str] = {}
        signature = []
        for name in sorted(named):
            uop = named[name].uop
            found = [u for u in uop.toposort() if u.op is Ops.BUFFER]
            if len(found) != 1 or not uop.is_realized:
                return None
            base = bases[name] = found[0]
            view: object = uop.shape
            if _whole(uop) is None:
                view = uop.substitute({base: UOp(Ops.NOOP)}).key.hex()
            same = first.setdefault(base, name)  # tied weights are one buffer
            signature.append((name, same, view, base.device, base.arg, base.dtype))
        views = [(v.key.hex(), [x.arg for x in bound], d, e) for v, bound, d, e in inputs.info]
        what = (
            key, signature, views, inputs.names, inputs.bound, inputs.constants, inputs.shapes,
            inputs.storages,
        )  # fmt: skip
        return cls(store.digest(what), bases)

    def load(self, inputs: _Inputs) -> _Replay | None:
        """The step, if it is there and fits what is at hand in every part."""
        plan = store.load(self.digest)
        if not isinstance(plan, Plan) or plan.inputs != inputs.storages:
            return None
        uops = []
        for storage in plan.storages:
            if storage.name is None:
                uops.append(UOp.new_buffer(storage.device, storage.size, storage.dtype))
                continue
            uop = self.named.get(storage.name)
            uop = launch.constant_of(storage.name, storage.device) if uop is None else uop
            if uop is None or Storage(uop.device, uop.arg, uop.dtype, storage.name) != storage:
                return None
            uops.append(uop)
        result = _as_tensors(plan.result, [*inputs.uops, *uops])
        return _Replay(plan, inputs, uops, result)

    def save(self, plan: Plan) -> None:
        store.save(self.digest, plan)
