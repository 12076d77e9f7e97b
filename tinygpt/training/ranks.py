"""How a run is shared by several processes: what each has of a batch, and what they add up.

Training asks one object, whose plain form `Alone` is for one process and does nothing. With `Ranks`
each process, a rank, computes gradients of its own rows of the same batch; their sums over all
ranks are what every rank then takes the same step with. Every decision of a run, to stop as to skip
a step, is made on such sums, so that all ranks make it alike.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from tinygrad import Tensor

from tinygpt.errors import InputError, say
from tinygpt.runtime import buffers, device
from tinygpt.training.world import Agreed, World, variable

# Pieces in which gradients are sent: 500 MB took 0.138 s so, and 0.248 s at once.
_PART_BYTES = 25_000_000
_LINE = 16  # numbers of a cache line, with which each tensor begins
_NUMBERS = 15  # most that `reduce` is given

T = TypeVar("T")


class Alone:
    """The one process of a run."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.asked: int | None = None  # the number of the signal that has asked this rank to stop

    @property
    def stopping(self) -> bool:
        """Whether the run is to stop before its next batch."""
        return self.asked is not None

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that does not divide into equal parts: see `need_even`."""

    def rows(self, array: np.ndarray) -> np.ndarray:
        """(B, ...) -> (B / size, ...): every size-th row, from this rank's number on."""
        return array

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th item, from this rank's number on."""
        return items

    def sums(
        self, shapes: Mapping[str, tuple[int, ...]], place: buffers.Place | None = None
    ) -> dict[str, Tensor]:
        """float32 tensors of zeros on one device or each of several, by name: what `reduce` adds
        up."""
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return {name: buffers.tensor(values, place) for name, values in zeros.items()}

    def reduce(self, numbers: np.ndarray) -> np.ndarray:
        """Replace the tensors of `sums` by their sums over all ranks.

        Args:
            numbers: (N,), at most 15, of which a sum is exact in float32.
        Returns:
            float32 (N,): their sums, too.
        """
        return numbers

    def total(self, *numbers: float) -> list[float]:
        """The sums of some numbers over all ranks."""
        return list(numbers)

    def of_first(self, number: float) -> float:
        """The number that rank 0 gives."""
        return number

    def in_turn(self, name: str, compute: Callable[[], T]) -> T:
        """Compute something which, the first time, is compiled: by one rank a machine at first."""
        return compute()

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors the values that they have in rank 0."""

    def compare(self, weights: Mapping[str, Tensor], step: int) -> None:
        """End the run where the weights are not the same in all ranks."""


class Ranks(Alone):
    """One of several processes of a run."""

    def __init__(self, among: World, limit_s: float) -> None:
        """
        Args:
            limit_s: how long one may wait for another, once the first step is made.
        """
        super().__init__()
        self.rank, self.size = among.rank, among.size
        self._world, self._limit_s = among, limit_s
        self._stops = self._has_reduced = False
        self._sums: dict[str, Tensor] = {}
        self._parts: dict[str, np.ndarray] = {}
        self._compiled: set[str] = set()
        self._flat = self._tail = np.zeros(0, np.float32)

    @property
    def stopping(self) -> bool:
        return self._stops

    def check_batch(self, batch_size: int) -> None:
        need_even(batch_size, self.size, "ranks")

    def rows(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[self.rank :: self.size])

    def part(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.size]

    def sums(
        self, shapes: Mapping[str, tuple[int, ...]], place: buffers.Place | None = None
    ) -> dict[str, Tensor]:
        sizes = [-(-math.prod(shape) // _LINE) * _LINE for shape in shapes.values()]
        self._flat = buffers.aligned(sum(sizes) + _NUMBERS + 1)
        start = 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            part = self._flat[start : start + math.prod(shape)].reshape(shape)
            start += size
            # On a CPU, tinygrad and MPI work in the same memory.
            of = buffers.tensor if self._copies else buffers.sharing
            self._parts[name], self._sums[name] = part, of(part)
        self._tail = self._flat[start:]
        return self._sums

    @property
    def _copies(self) -> bool:
        return device.default() != "CPU"

    def reduce(self, numbers: np.ndarray) -> np.ndarray:
        if self._copies:
            for name, part in self._parts.items():
                part[...] = buffers.read(self._sums[name]).reshape(part.shape)
        self._tail[: len(numbers)] = numbers
        self._tail[-1] = self.asked is not None
        if self._has_reduced:  # the first step is made, and all is compiled
            self._world.limit_s = self._limit_s
        self._world.total(self._flat, _PART_BYTES)
        self._has_reduced = True
        if self._copies:
            for name, part in self._parts.items():
                buffers.write(self._sums[name], part)
        self._decide(self._tail[-1])
        return self._tail[: len(numbers)].copy()

    def _decide(self, asked: float) -> None:
        if asked > 0:
            self._stops, self.asked = True, self.asked or signal.SIGTERM

    def total(self, *numbers: float) -> list[float]:
        array = np.array([*numbers, self.asked is not None], np.float64)
        self._world.total(array)
        self._decide(array[-1])
        return array[:-1].tolist()

    def of_first(self, number: float) -> float:
        return self.total(0 if self.rank else number)[0]

    def in_turn(self, name: str, compute: Callable[[], T]) -> T:
        is_new, leads = name not in self._compiled, variable("LOCAL_RANK") == 0
        self._compiled.add(name)
        if is_new and not leads:
            self._world.meet()  # what has been compiled is found in the cache
        result = compute()
        if is_new and leads:
            self._world.meet()
        return result

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            values = buffers.read(tensor)
            self._world.spread(values)
            if self.rank:
                buffers.write(tensor, values.reshape(tensor.shape))

    def compare(self, weights: Mapping[str, Tensor], step: int) -> None:
        digest = 0
        for weight in weights.values():
            digest = zlib.crc32(buffers.read(weight), digest)
        told = self._world.exchange({"weights": f"{digest:08x}"})
        for rank, theirs in enumerate(told):
            if theirs != told[0]:
                raise Differing(
                    f"the weights of rank {rank} are not those of rank 0 at step {step}, though "
                    "they are computed alike: a processor of another kind, or a fault in one; "
                    "nothing is saved of it, and --resume goes on from the last checkpoint"
                )


def need_even(batch_size: int, count: int, what: str) -> None:
    """Refuse a batch that does not divide into equal parts.

    Args:
        count, what: how many of what have a part each, such as 4 ranks.
    Raises:
        InputError: naming what would do.
    """
    if rest := batch_size % count:
        next_ones = {batch_size - rest, batch_size - rest + count} - {0}
        others = " and ".join(map(str, sorted(next_ones)))
        raise InputError(
            f"--batch-size is {batch_size}, which {count} {what} cannot share evenly: the next "
            f"that they can are {others}; or take as many {what} as divide it"
        )


class Differing(Agreed):
    """The ranks have come to different weights, of which none is to be kept."""


def settle(among: World) -> None:
    """Take this rank's share of its machine: cores, or the GPU of its number on that machine.

    To be called before anything is computed. CPU_COUNT, where it is set, says how many threads.
    """
    host, mine = platform.node(), device.usable_cores()
    told = among.exchange({"host": host, "cores": sorted(mine)})
    here = [set(each["cores"]) for each in told if each["host"] == host]
    cores = set().union(*here)
    device.take_gpu(variable("LOCAL_RANK"))
    if "CPU_COUNT" not in os.environ:
        device.use_threads(max(1, min(len(mine), len(cores) // len(here))))
    if len(here) > len(cores):
        known = count(len(cores), "core")
        say(f"{len(here)} ranks on {known}: as many ranks as cores would be faster")
    elif len(mine) < len(cores) and len(here) * len(mine) < (os.cpu_count() or 1):
        share = count(len(mine), "core")
        say(f"mpirun binds each rank to {share}: --bind-to none lets it use more")


def count(number: int, what: str) -> str:
    """1 core, 2 cores."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def fingerprint(tokens: np.ndarray, first: int, stride: int) -> np.ndarray:
    """What tells a batch from others, whichever rank has which of its rows.

    Args:
        tokens: int32 (B, T), of which row i is row `first + i * stride` of the whole batch.
    Returns:
        float32 (3,): sums over the rows of three bytes of a checksum. Those of parts add up, and
        are exact for 65,536 rows.
    """
    sums = [zlib.crc32(row.tobytes(), first + i * stride) for i, row in enumerate(tokens)]
    parts = (sum(each >> shift & 0xFF for each in sums) for shift in (0, 8, 16))
    return np.array([*parts], np.float32)
