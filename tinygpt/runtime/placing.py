"""Where the calls of a table run, and where threads must meet: what could be silently wrong.

A forgotten meeting gives wrong numbers now and then. So the tests compare thousands of random
tables with their calls one by one, and watch some under ThreadSanitizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# A call of one thread goes to another thread than the first where the first has so much more to do
# (operations and bytes, about 30 us): less than that, a meeting later on would eat up.
_WORTH_SPREADING = 300_000


class Access(NamedTuple):
    """A part of a buffer that a call is given."""

    buffer: int  # its number
    offset: int  # bytes
    size: int  # bytes
    reads: bool
    writes: bool


class Call(NamedTuple):
    """A function to call with pointers to parts of buffers, and then numbers."""

    name: str
    function: int  # its number
    accesses: tuple[Access, ...]
    values: tuple[int | str | None, ...]  # an integer, a variable's name, or the thread's number
    threads: int = 1
    work: float = 0.0  # operations and bytes, to weigh one call against another


class Placed(NamedTuple):
    """Where and when a call runs: on threads `first` and up, after a meeting or at once."""

    first: int
    meets: bool


def place_calls(
    calls: Sequence[Call], spaces: Sequence[tuple[int, int]], most: int
) -> list[Placed]:
    """Decide which thread runs each call, and where all threads must meet.

    A call must wait for those before it that wrote what it reads or writes, or read what it
    writes. Where all of these ran on the very thread that it runs on, it waits for them anyhow;
    else all threads meet before it. After a meeting nothing before it matters any more.

    Args:
        calls: in their order.
        spaces: for each buffer the number of its memory and where it starts in it. Buffers of the
            same number may overlap.
        most: how many threads there are; a call of one thread may go to any of them.
    Returns:
        One for each call.
    """
    placed = []
    # What was touched since threads last met, by memory, and then by which threads.
    touched: dict[int, dict[tuple[int, int, bool], set[tuple[int, int]]]] = {}
    loads = [0.0] * most
    for call in calls:
        spans = []
        for access in call.accesses:
            memory, base = spaces[access.buffer]
            start = base + access.offset
            spans.append((memory, start, start + access.size, access.writes))
        owners: set[tuple[int, int]] = set()
        for memory, start, end, writes in spans:
            for (a, b, wrote), threads in touched.get(memory, {}).items():
                if a < end and start < b and (wrote or writes):
                    owners |= threads
        first, meets = 0, False
        if call.threads > 1:
            meets = bool(owners)
        elif not owners:
            least = min(range(most), key=loads.__getitem__)
            first = least if loads[0] - loads[least] >= _WORTH_SPREADING else 0
        elif len(owners) == 1 and next(iter(owners))[1] == 1:
            first = next(iter(owners))[0]
        else:
            meets = True
        if meets:
            touched, loads = {}, [0.0] * most
        for i in range(first, first + call.threads):
            loads[i] += call.work / call.threads
        owner = (first, call.threads)
        for memory, start, end, writes in spans:
            known = touched.setdefault(memory, {})
            if writes:  # what lies wholly under it is done before it, and so before what follows
                for span in [s for s in known if start <= s[0] and s[1] <= end]:
                    del known[span]
            known.setdefault((start, end, writes), set()).add(owner)
        placed.append(Placed(first, meets))
    return placed


def spaces_of(
    calls: Iterable[Call], addresses: Sequence[int], inputs: int
) -> list[tuple[int, int]]:
    """For `place_calls`: each input has a memory of its own, buffers that overlap share one."""
    sizes = [0] * len(addresses)
    for call in calls:
        for access in call.accesses:
            sizes[access.buffer] = max(sizes[access.buffer], access.offset + access.size)
    spaces = [(i, 0) for i in range(len(addresses))]
    end, memory = -1, -1
    for i in sorted(range(inputs, len(addresses)), key=addresses.__getitem__):
        if addresses[i] >= end:
            memory = i
        end = max(end, addresses[i] + sizes[i])
        spaces[i] = (memory, addresses[i])
    return spaces
