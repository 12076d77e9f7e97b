"""Values into the memory of a device and back, past tinygrad's scheduler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from tinygrad import Tensor, UOp, dtypes
from tinygrad.device import Buffer, BufferSpec, MultiBuffer
from tinygrad.dtype import DType, _from_np_dtype, _to_np_dtype
from tinygrad.uop.ops import KernelInfo, Ops

from tinygpt.runtime import cpu_memory

Given = TypeVar("Given")
Place = str | tuple[str, ...]  # a device, or several

_MAKING = Lock()  # tinygrad makes tensors for one thread at a time


def _after_fork() -> None:
    global _MAKING
    _MAKING = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _buffers(uop: UOp) -> list[Buffer]:
    """The memory of a tensor on each of its devices."""
    buffer = uop.base.buffer
    return list(buffer.bufs) if isinstance(buffer, MultiBuffer) else [buffer]


def _memory(buffer: Buffer) -> memoryview:
    """The memory of a buffer on the CPU itself, once what was queued for it is done."""
    allocator: Any = buffer.allocator
    return allocator._as_buffer(buffer._buf)


def allocate(buffer: Buffer) -> Buffer:
    """Memory for a buffer that may be large and is seldom made, as weights are; the buffer.

    Once it is dropped the system has its memory back, where tinygrad would keep it for the next
    buffer of exactly that size.
    """
    if not buffer.base.is_allocated():
        buffer.base.options = BufferSpec(nolru=True)
    return buffer.ensure_allocated()


def empty(
    shape: Sequence[int], dtype: DType, device: Place | None = None, axis: int | None = None
) -> Tensor:
    """A tensor that has no memory yet, on one device or several: see `tensor`."""
    sizes, several = list(shape), isinstance(device, tuple)
    if isinstance(device, tuple) and axis is not None:
        sizes[axis] //= len(device)
    with _MAKING:
        return Tensor(UOp.empty(tuple(sizes), dtype, device, axis if several else None))


def tensor(values: np.ndarray, device: Place | None = None, axis: int | None = None) -> Tensor:
    """The values in the memory of a device (by default the one in use), written there directly.

    `Tensor(values).realize()` would have tinygrad's scheduler look at every tensor there is, which
    for the 148 of a GPT-2 takes half of the time to load them. Threads may call it side by side.

    Args:
        device: where there are several, each has all of the values.
        axis: where there are several, each has an equal part along this axis instead.
    """
    made = empty(values.shape, _from_np_dtype(values.dtype), device, axis)
    for buffer in _buffers(made.uop):
        allocate(buffer)
        if buffer.device == "CPU":
            cpu_memory.populate(buffer)
    write(made, values)
    return made


def laid(source: Tensor, device: Place, axis: int | None = None, rows: int | None = None) -> Tensor:
    """A tensor on other devices: see `tensor`. One that has no memory yet is given none.

    Args:
        rows: fill it up with zeros to so many.
    """
    shape: Sequence[Any] = source.shape if rows is None else (rows, *source.shape[1:])
    base = source.uop.base
    if base.op is Ops.BUFFER and not any(buffer.is_allocated() for buffer in _buffers(base)):
        return empty(shape, source.dtype, device, axis)
    return tensor(_filled_up(source.numpy(), shape[0] if shape else 1), device, axis)


def laid_like(values: np.ndarray, other: Tensor) -> Tensor:
    """Values on the devices of another tensor, in parts along the same axis, if they have it, and
    filled up with rows of zeros where it has more."""
    axis = other.uop.axis
    place = None if axis is None or axis >= values.ndim else axis
    return tensor(_filled_up(values, int(other.shape[0])), other.device, place)


def _filled_up(values: np.ndarray, rows: int) -> np.ndarray:
    if not values.ndim or len(values) == rows:
        return values
    return np.pad(values, [(0, rows - len(values)), *[(0, 0)] * (values.ndim - 1)])


def write(target: Tensor, values: np.ndarray) -> None:
    """Replace the values of a tensor that has memory of its own by others of its shape and type."""
    buffers, axis = _buffers(target.uop), target.uop.axis
    parts = [values] * len(buffers) if axis is None else np.split(values, len(buffers), axis)
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.ensure_allocated()
        if buffer.device == "CPU":
            # Straight into its memory, in whatever order the values lie in theirs.
            memory = np.frombuffer(_memory(buffer), part.dtype)
            np.copyto(memory.reshape(part.shape), part)
        else:
            # A driver asks for memory that may be written, which that of a mapped file may not.
            part = np.require(part, requirements=["C", "W"])
            buffer.copyin(part.reshape(-1).view(np.uint8).data)


def aligned(count: int) -> np.ndarray:
    """float32 (count,) of zeros, which begins where a cache line does."""
    memory = np.zeros(4 * count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * count].view(np.float32)


def sharing(values: np.ndarray) -> Tensor:
    """A tensor of the CPU in the memory of an array, which has to be kept as long."""
    made = Tensor.empty(*values.shape, dtype=_from_np_dtype(values.dtype), device="CPU")
    _buffers(made.uop)[0].allocate(external_ptr=values.ctypes.data)
    return made


def written(target: Tensor, part: Tensor, values: Tensor) -> Tensor:
    """The target as it is once values have been written into a part of it, a view, in place.

    The write happens when the result is computed, so that a captured step sees one fixed buffer.
    """
    return Tensor(target.uop.after(part.uop.store(values.uop)))


def scattered(target: Tensor, values: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """The target (N, H, S, D) as it is once each row of values stands in it, in place.

    A kernel of its own, because as an assignment the whole target would be written anew.

    Args:
        values: (B, H, T, D), of the target's dtype.
        starts: int32 (B,): where along S each begins; one that does not fit is not written.
        rows: int32 (B,), each another one: in which row of the target each stands.
    """

    def kernel(target: UOp, values: UOp, starts: UOp, rows: UOp) -> UOp:
        (B, H, T, D), (N, _, S, _) = values.shape, target.shape
        b, h, t, d = (UOp.range(size, i) for i, size in enumerate((B, H, T, D)))
        start, row = starts[b].cast(dtypes.weakint), rows[b].cast(dtypes.weakint)
        fits = (start >= 0) & (start <= S - T)
        # What does not fit leaves what stands in some place of its own row. Remainders have bounds
        # that tinygrad knows: so it counts in 32 bits, which is all that WebGPU has.
        place = target[row % N, h, start % (S - T + 1) + t, d]
        store = place.store(fits.where(values[b, h, t, d], place))
        return store.end(b, h, t, d).sink(arg=KernelInfo(name="scatter"))

    given = (each.contiguous().uop for each in (values, starts, rows))
    return Tensor(target.uop.custom_kernel(*given, fxn=kernel)[0])


def moved(given: Given, device: Place | None) -> Given:
    """A tensor on a device, copied there from another, or on several, each of which has all of it.

    Anything else is given as it is, and without a device a tensor too.
    """
    held: Any = given
    if device is None or not isinstance(given, Tensor) or given.device == device:
        return held
    # Or it may fuse with what is computed before and behind, in one kernel for both devices.
    return held.contiguous().to(device).contiguous()


def alias(tensor: Tensor) -> Tensor:
    """Another Tensor of the same values, which stays what it is when the first is replaced."""
    return Tensor(tensor.uop)


def place(tensor: Tensor) -> object:
    """What tells the memory of a tensor from all others, as long as this is held."""
    return tensor.uop


def read(source: Tensor) -> np.ndarray:
    """The values of a realised tensor that has memory of its own: a copy, in one dimension.

    `Tensor.tolist` would build a graph first, though there is nothing to compute.
    """
    buffers, axis = _buffers(source.uop), source.uop.axis
    if axis is None:  # what several devices have, the first has
        return _values(buffers[0], source)
    shape = source.uop.shard_shape
    parts = [_values(buffer, source).reshape(shape) for buffer in buffers]
    return np.concatenate(parts, axis).reshape(-1)


def _values(buffer: Buffer, source: Tensor) -> np.ndarray:
    if buffer.device != "CPU":
        return buffer.numpy()
    return np.frombuffer(_memory(buffer), _to_np_dtype(source.dtype)).copy()
