"""A plan with memory: what a captured step's later calls are."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
from tinygrad import Device, Tensor, UOp
from tinygrad.device import Buffer
from tinygrad.engine.jit import JitError
from tinygrad.engine.realize import capturing
from tinygrad.helpers import GlobalCounters
from tinygrad.uop.ops import Ops, buffers

from tinygpt.runtime import thread_pool
from tinygpt.runtime.buffers import allocate
from tinygpt.runtime.graph import Graph
from tinygpt.runtime.placing import Call
from tinygpt.runtime.plan import Inputs, Plan, as_tensors, buffers_of, params_of, whole


class _Result(NamedTuple):
    """What a step returns to one thread, and where its memory is."""

    tensors: Any
    uops: list[UOp]
    addresses: list[tuple[int, int]]  # (buffer, address)


class Replay:
    """A plan with memory: runs it with the inputs and variables that it is given."""

    def __init__(self, plan: Plan, inputs: Inputs, uops: list[UOp], result: Any) -> None:
        """
        Args:
            inputs: of the first call; later ones must be like them.
            uops: the BUFFER of each storage.
            result: the tensors to return, over these.
        """
        self.plan, self.uops = plan, uops
        self.names, self.info, self.constants = inputs.names, inputs.info, inputs.constants
        # The memory of the first inputs is used for no longer than this: each call brings its own.
        parts = [[allocate(b) for b in buffers_of(u)] for u in (*inputs.uops, *uops)]
        self._first_of: list[int] = []  # the number of each storage's first buffer
        addresses: list[int] = []
        for storage in parts:
            self._first_of.append(len(addresses))
            addresses += [buffer._buf.va_addr for buffer in storage]
        self._count = sum(len(storage) for storage in parts[: len(inputs.uops)])
        loaded = [thread_pool.load(binary, "step") for binary in plan.binaries]
        functions = [address for _, address in loaded]
        functions.append(thread_pool.memcpy())  # a copy is call number -1
        self.graph = Graph(
            plan.calls, functions, addresses, self._count, (loaded, parts[len(inputs.uops) :])
        )
        names = {b.device for storage in parts for b in storage}
        self._devices = [Device[name] for name in sorted(names)]
        self._variables = frozenset(self.graph.variables)
        self._sizes = [b.nbytes for storage in parts for b in storage]
        self._only_written = _only_written(plan.calls, len(addresses))
        self._measure()
        self._simple = self._simple_inputs(inputs)
        # What was given last time, of which no more than the address need be known.
        self._last: list[tuple[Any, int]] = [(lambda: None, 0)] * len(self._simple or ())
        self._copies: dict[int, np.ndarray] = {}
        self._careful = False
        own = self._addresses_of(uops, plan.private)
        self._result = _Result(result, uops, own)
        self._results = threading.local()
        self._results.result = self._result

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        found = None if kwargs else self._addresses(args)
        if found is None:
            found = self._addresses_at_length(args, kwargs)
        addresses, values, keep = found
        result = getattr(self._results, "result", None) or self._new_result()
        table = self.graph
        with thread_pool.running:
            # A recorder of ours knows its thread; a TinyJit may be of any.
            here = threading.get_ident()
            if capturing and getattr(capturing[0], "thread", here) == here:
                raise JitError("a captured step cannot be called while a TinyJit captures")
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

    def _simple_inputs(self, inputs: Inputs) -> list[tuple] | None:
        """What each tensor must be like, where all are whole buffers that are given one by one."""
        expected: list[tuple] = []
        for position, given in enumerate(inputs.args):
            if isinstance(given, Tensor):
                if (buffer := whole(given.uop)) is None or not isinstance(given.device, str):
                    return None
                expected.append((position, given.shape, given.dtype, buffer.arg, given.device))
            elif isinstance(given, (list, tuple, dict)):
                return None
        return expected if not inputs.kwargs else None

    def _addresses(self, args: tuple) -> tuple[list[int], dict[str, int], Any] | None:
        """Addresses of the inputs and values of variables, or None for a look at length."""
        if (expected := self._simple) is None:
            return None
        values: dict[str, int] = {}
        addresses: list[int] = []
        at = 0
        for position, given in enumerate(args):
            if given.__class__ is UOp:
                if given.op is not Ops.BIND:
                    return None
                values[given.src[0].arg[0]] = given.src[1].arg
            elif given.__class__ is Tensor:
                if at == len(expected):
                    return None
                uop = given.uop
                last, address = self._last[at]
                if last() is not uop:
                    found = self._address(uop, (position, *expected[at]))
                    if found is None:
                        return None
                    address = found
                    self._last[at] = ref(uop), address
                elif position != expected[at][0]:
                    return None
                addresses.append(address)
                at += 1
        if at != len(expected) or (at > 1 and len(set(addresses)) != at):
            return None
        if not self._variables <= values.keys():
            return None
        for position, constant in self.constants:
            if args[position] != constant:
                return None
        return addresses, values, args

    @staticmethod
    def _address(uop: UOp, expected: tuple) -> int | None:
        """Where an input lies, if it is a whole buffer with memory, and like the first one."""
        if (buffer := whole(uop)) is None:
            return None
        position, *like = expected
        if [position, uop.shape, uop.dtype, buffer.arg, buffer.src[1].arg] != like:
            return None
        memory = buffers.get(buffer)
        if not isinstance(memory, Buffer) or not memory.is_initialized():
            return None
        return memory._buf.va_addr

    def _addresses_at_length(
        self, args: tuple, kwargs: dict
    ) -> tuple[list[int], dict[str, int], Any]:
        """The same, by tinygrad's own look at what is given.

        Raises:
            JitError: where it is not like what was given at first.
        """
        with thread_pool.building:
            inputs = Inputs(args, kwargs)
        if inputs.names != self.names or inputs.info != self.info:
            raise JitError(f"the step was captured with {self.info}, not {inputs.info}")
        if inputs.constants != self.constants:
            raise JitError(f"the step was captured with {self.constants}, not {inputs.constants}")
        if missing := self._variables - inputs.values.keys():
            raise JitError(f"the step needs values for {sorted(missing)}")
        for storage, expected in zip(inputs.storages, self.plan.inputs, strict=True):
            if storage != expected:
                raise JitError(f"the step was captured with {expected}, not {storage}")
        parts = [b.ensure_allocated() for u in inputs.uops for b in buffers_of(u)]
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
            if (i, address) in self._apart:
                self.graph.set_address(i, address)
                continue
            over = (self._starts < address + size) & (address < self._ends)
            if over.any():
                if self._fresh[over].any():
                    copied = np.empty(size + 64, np.uint8)
                    at = (copied.ctypes.data + 63) // 64 * 64
                    ctypes.memmove(at, address, size)
                    kept.append(copied)
                    address = at
                    self._copies[i] = copied
                else:
                    careful = True
            else:
                self._apart.add((i, address))
            self.graph.set_address(i, address)
        if len(addresses) > 1:
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
        self._apart: set[tuple[int, int]] = set()  # inputs and addresses that overlap nothing

    def _addresses_of(self, uops: list[UOp], storages: Sequence[int]) -> list[tuple[int, int]]:
        found = []
        for i in storages:
            first = self._first_of[len(self.plan.inputs) + i]
            for lane, buffer in enumerate(buffers_of(uops[i])):
                found.append((first + lane, allocate(buffer)._buf.va_addr))
        return found

    def _new_result(self) -> _Result:
        """Tensors of its own for another thread, which may read them while the first runs on."""
        uops, plan = list(self.uops), self.plan
        for i in plan.private:
            storage = plan.storages[i]
            uops[i] = UOp.new_buffer(storage.device, storage.size, storage.dtype)
        if any(u.arg < len(plan.inputs) for u in params_of(plan.result)):
            return self._result  # it gives an input back
        filler = [uops[0]] * len(plan.inputs)
        tensors = as_tensors(plan.result, [*filler, *uops])
        result = _Result(tensors, uops, self._addresses_of(uops, plan.private))
        self._results.result = result
        return result


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
