"""A captured step as plain data, which another process can run with memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tinygrad import Tensor, UOp
from tinygrad.device import Buffer, MultiBuffer
from tinygrad.dtype import DType
from tinygrad.engine.jit import _prepare_jit_inputs
from tinygrad.engine.realize import _resolve, estimate_uop, get_call_arg_uops, unwrap_multi
from tinygrad.nn.state import get_parameters
from tinygrad.uop.ops import Ops

from tinygpt.environment import MOST_THREADS
from tinygpt.runtime.placing import Access, Call


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


class Inputs:
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


def buffers_of(uop: UOp) -> list[Buffer]:
    """The buffer of each device."""
    buffer = uop.buffer
    return list(buffer.bufs) if isinstance(buffer, MultiBuffer) else [buffer]


def make_plan(
    linear: UOp, inputs: Inputs, result: Any, older: set[UOp], names: Mapping[UOp, str]
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
        for buffer in buffers_of(uop):
            given[-1][id(buffer.base)] = count, buffer.offset
            count += 1
    seen = set()
    outputs = [u for t in get_parameters(result) for u in t.uop.toposort() if u.op is Ops.BUFFER]
    arguments = [u for call in linear.src for arg in call.src[1:] for u in arg.toposort()]
    for uop in [*arguments, *outputs]:
        if uop.op is Ops.BUFFER and uop not in seen and uop not in inputs.uops:
            seen.add(uop)
            uops.append(uop)
            for buffer in buffers_of(uop):
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
        of = [numbers if (i := _input_of(u)) is None else given[i] for u in found]
        estimates = estimate_uop(call)
        work = float(sum(getattr(x, "vmax", x) for x in (estimates.ops, estimates.mem)))
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
            if threads > MOST_THREADS:
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


def _input_of(uop: UOp) -> int | None:
    """The number of the input that an argument is a part of."""
    return next((u.arg for u in uop.toposort() if u.op is Ops.PARAM), None)


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


def as_tensors(result: Any, uops: Sequence[UOp]) -> Any:
    """A plan's result over storages, the inputs' first."""

    def made(output: Output) -> Tensor:
        found = [u for u in output.view.toposort() if u.op is Ops.PARAM]
        return Tensor(output.view.substitute({u: uops[u.arg] for u in found}))

    return _map(result, made)


def params_of(result: Any) -> list[UOp]:
    found: list[UOp] = []
    _map(
        result, lambda output: found.extend(u for u in output.view.toposort() if u.op is Ops.PARAM)
    )
    return found


def whole(uop: UOp) -> UOp | None:
    """The BUFFER that a tensor is all of, in whatever shape."""
    if uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return uop if uop.op is Ops.BUFFER else None
