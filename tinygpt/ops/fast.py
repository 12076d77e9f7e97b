"""Fast CPU forms of the operations that take the time, each beside its plain tensor form.

tinygrad compiles a graph of small kernels, and on a CPU starting one costs as much as a small one
computes. So the forms here are C, in kernels.c, that tinygrad's own clang compiles and its own
runtime starts, each doing as much as it can between two starts. They hold where the CPU is the
device and clang its compiler; everywhere else, or with TINYGPT_KERNELS=0, the plain forms do.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.helpers import CPU_COUNT, Context
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo

from tinygpt.runtime.device import renderer

# tinygrad vectorises and threads a kernel along an axis whose length its factors divide. GPT-2's
# 50257 rows are 29 * 1733: as they stand, that product runs several times slower.
_EVEN = 64

# Up to so many rows a product with weights is bound by reading them: see `few` in kernels.c.
_FEW = 8

_INTEGER_TYPES = {dtypes.int32: "int", dtypes.uint32: "unsigned"}
# Buffers of int32, where they are absent.
_INTEGERS = ("tokens", "padding", "end")
# How C names what weights may be held in.
WEIGHTS = {
    dtypes.float32: {"WEIGHT": "float"},
    dtypes.float16: {"WEIGHT": "__fp16"},
    dtypes.uint16: {"WEIGHT": "unsigned short", "BFLOAT16": 1},
    dtypes.int8: {"WEIGHT": "signed char"},
}
ACTIVATIONS = {"gelu_tanh": 1, "gelu": 2, "relu": 3}
# Starting a second thread takes about as long as this many floating-point operations of one.
_THREAD_FLOPS = 1_500_000
# So many more does a product's first thread, which begins before the others and must wait for them.
_HEAD_START = 8_000_000


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """x @ weight.T * scale + bias; the plain form cuts an awkward number of rows in two.

    Args:
        x: float32 (..., in_features).
        weight: any dtype of `precision.DTYPES` (out_features, in_features).
        bias: (out_features,) or None.
        scale: (out_features,) or None.
    Returns:
        (..., out_features).
    """
    rows = weight.shape[0]
    even = rows - rows % _EVEN
    if fast(x, weight):
        flat = x.reshape(-1, x.shape[-1])
        y = matmul(flat, weight, b_transposed=True).reshape(*x.shape[:-1], rows)
    elif even in (0, rows):
        y = x @ widen(weight).transpose()
    else:
        parts = (widen(weight[:even]), widen(weight[even:]))
        y = Tensor.cat(*[(x @ part.transpose()).contiguous() for part in parts], dim=-1)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def widen(weight: Tensor) -> Tensor:
    """A weight of any dtype of `precision.DTYPES` as float32, its scale not yet applied.

    bfloat16, the upper half of a float32, is held as uint16: so it works on every backend.
    """
    if weight.dtype == dtypes.uint16:
        return (weight.cast(dtypes.uint32) * 2**16).bitcast(dtypes.float32)
    return weight.float()


def fast(*tensors: Tensor) -> bool:
    """Whether tensors are where the C forms run: on the CPU, with clang, and not turned off."""
    if os.environ.get("TINYGPT_KERNELS") == "0" or {t.device for t in tensors} != {"CPU"}:
        return False
    if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
        return False
    return renderer("CPU") == "ClangJIT"


def matmul(a: Tensor, b: Tensor, a_transposed: bool = False, b_transposed: bool = False) -> Tensor:
    """a @ b, of which either may be given transposed; gradients go through the same kernel.

    Args:
        a: float32 (..., M, K), or (..., K, M) if a_transposed.
        b: (..., K, N), or (..., N, K) if b_transposed; the same leading sizes as a. A dtype
            narrower than float32 is widened, and then there are no gradients.
    Returns:
        float32 (..., M, N).
    """
    *leading, M, K = a.shape if not a_transposed else (*a.shape[:-2], a.shape[-1], a.shape[-2])
    N = b.shape[-2 if b_transposed else -1]
    if not fast(a, b):
        b = widen(b)
        return (a.transpose(-2, -1) if a_transposed else a) @ (
            b.transpose(-2, -1) if b_transposed else b
        )
    batch = math.prod(leading)
    few = b_transposed and not a_transposed and batch == 1 and M <= _FEW
    macros = {
        "MATMUL": 1, "BATCH": batch, "SIZE_M": M, "SIZE_N": N, "SIZE_K": K, **WEIGHTS[b.dtype],
        "A_TRANSPOSED": int(a_transposed), "B_TRANSPOSED": int(b_transposed),
        "FEW": int(few), "HEAD_START": 0 if few else f"{_HEAD_START}L",
    }  # fmt: skip

    def gradient(g: UOp, call: UOp) -> tuple[UOp | None, ...]:
        d, (x, y) = Tensor(g), (Tensor(u) for u in call.src[2:4])
        if a_transposed:
            dx = matmul(y, d, b_transposed, True)
        else:
            dx = matmul(d, y, False, not b_transposed)
        dy = matmul(d, x, True, a_transposed) if b_transposed else matmul(x, d, not a_transposed)
        return None, dx.uop, dy.uop

    flops = 2 * batch * M * N * K
    threads = count_threads(flops, _THREAD_FLOPS if few else _HEAD_START)
    buffers = {"c": Tensor.empty(*leading, M, N), "a": a, "b": b}
    gradient = gradient if b.dtype == dtypes.float32 else None
    return call("matmul", buffers, ("c",), macros, flops, gradient=gradient, threads=threads)[0]


def threshold(order: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The C form of `sampling._threshold`, where `fast` holds: one kernel instead of 64, which
    are a quarter of a GPT-2's time in int8 with top-k or top-p.

    Args:
        order: uint32 (B, V).
        weights: float (B, V).
        target: (1,).
    Returns:
        uint32 (B, 1).
    """
    B, V = order.shape
    found = Tensor.empty(B, 1, dtype=dtypes.uint32)
    buffers = {"found": found, "order": order, "weights": weights.float(), "target": target.float()}
    buffers = {name: tensor.contiguous() for name, tensor in buffers.items()}
    macros = {"THRESHOLD": 1, "ROWS_OF_ORDER": B, "SIZE": V, **WEIGHTS[dtypes.float32]}
    flops = 64 * B * V
    threads = min(B, count_threads(flops))
    return call("threshold", buffers, ("found",), macros, flops, threads=threads)[0]


def count_threads(flops: int, each: int = _THREAD_FLOPS) -> int:
    return max(1, min(CPU_COUNT.value, flops // each))


@functools.cache
def meeting_place() -> Tensor:
    """Where a kernel's threads wait for each other: see `barrier` in kernels.c."""
    place = np.zeros(34, np.int32)
    with suppress(AttributeError, TypeError):  # a system that has no such function
        yield_ = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
        place[32:].view(np.uint64)[0] = yield_.value
    with Context(CAPTURING=0):  # not a part of any JIT, whose planner might lend its memory out
        return Tensor(place, device="CPU").contiguous().realize()


@functools.cache
def _source(*names: str) -> str:
    return "".join(Path(__file__).with_name(name).read_text() for name in names)


def call(
    kind: str,
    buffers: Mapping[str, Tensor | None],
    written: Collection[str],
    macros: Mapping[str, object],
    flops: int,
    variables: Mapping[str, UOp] | None = None,
    gradient: Callable[[UOp, UOp], tuple[UOp | None, ...]] | None = None,
    sources: Sequence[str] = ("kernels.c",),
    threads: int | None = None,
) -> list[Tensor]:
    """Call a function of a C file, whose parameters are the buffers by their names, `core_id`, and
    the variables.

    Args:
        kind: the kernel's name in profiles.
        buffers: what it reads and writes; one that is None is a null pointer there.
        written: names of the buffers that it writes.
        macros: what the C text needs to know beforehand.
        flops: how many floating-point operations it does, which decides on threads.
        gradient: as tinygrad's `custom_kernel` takes it.
        sources: C files next to this one, put one behind the other.
        threads: at most so many; None as many as pay.
    Returns:
        the written buffers, in the order of `buffers`, as they are after the call.
    """
    threads = count_threads(flops) if threads is None else threads
    present = {name: tensor for name, tensor in buffers.items() if tensor is not None}
    variables, places = variables or {}, tuple(range(len(present)))
    outs = tuple(i for i, name in enumerate(present) if name in written)
    shape = "_".join(str(size) for size in next(iter(present.values())).shape)
    name = f"{kind}_{shape}"
    pointers = [f"{_c_type(n, t, n in written)} *{n}" for n, t in present.items()]
    numbers = [f"int {number}" for number in ("core_id", *variables)]
    lines = [f"#define {key} {value}" for key, value in {**macros, "THREADS": threads}.items()]
    for null in (name for name in buffers if name not in present):
        lines.append(f"static {'int' if null in _INTEGERS else 'float'} *const {null} = 0;")
    lines += [f"#define ENTRY void {name}({', '.join([*pointers, *numbers])})", _source(*sources)]
    size_bytes = sum(tensor.nbytes() for tensor in present.values())

    def program(*params: UOp) -> UOp:
        integers = (UOp.variable("core_id", 0, threads - 1, dtypes.int), *variables.values())
        info = KernelInfo(name, estimates=Estimates(flops, size_bytes, size_bytes))
        sink = UOp.sink(*params, *integers, arg=info)
        ins = tuple(i for i in places if i not in outs)
        arg = ProgramInfo(name, (threads, 1, 1), None, integers, places, outs, ins)
        order = UOp(Ops.LINEAR, src=(*params, *integers))
        source = UOp(Ops.SOURCE, arg="\n".join(lines))
        return UOp(Ops.PROGRAM, src=(sink, UOp(Ops.DEVICE, arg="CPU"), order, source), arg=arg)

    uops = [tensor.uop for tensor in present.values()]
    found = UOp.custom_kernel(*uops, fxn=program, grad_fxn=gradient)
    return [Tensor(found[i]) for i in outs]


def _c_type(name: str, tensor: Tensor, written: bool) -> str:
    if tensor.dtype in _INTEGER_TYPES:
        return _INTEGER_TYPES[tensor.dtype] if written else f"const {_INTEGER_TYPES[tensor.dtype]}"
    if written:
        return "float"
    is_matrix = name == "b" or (name.endswith("_weight") and "ln_" not in name)
    return "const WEIGHT" if is_matrix else "const float"
