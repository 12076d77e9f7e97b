"""The processes that `mpirun` has started together: how they meet, talk, wait, and end.

Open MPI by itself waits for ever for a process that has left in order, is stopped, or cannot be
reached. So here nothing waits without a limit, and a process in which something goes wrong says so
and ends at once, upon which `mpirun` ends the others.

The package mpi4py is imported only where `mpirun` has started more than one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from typing import Any, NoReturn, TextIO

import numpy as np

from tinygpt.errors import InputError, message_of, say, talk

_COMES_S = 600.0  # how long the others may take to the first step, in which all is compiled
_ANSWERS_S = 3.0  # and to answer a roll-call, of those that wait themselves
_LETS_S = 0.5  # how long any other rank lets the first one tell of an error
_LOOKS_S = 0.1  # how often one who waits looks for a roll-call
_SPINS_S = 1.0  # after so long a wait nobody hurries any more
_ROLL_CALL = 1  # the tag of its messages

current: World | None = None  # what `joined` has joined


def variable(name: str, default: int = 0) -> int:
    """A number that Open MPI tells each process that it starts, by the end of its name."""
    text = os.environ.get(f"OMPI_COMM_WORLD_{name}", "")
    return int(text) if text.isdigit() else default


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that `mpirun` has started, while the block runs, if it has started
    more than one; each of them has to come here.

    Whatever ends the block in one of them ends all: it is told in one line, by one of them where
    all agree on it. An end that all have come to in order is waited for.
    """
    global current
    if variable("SIZE", 1) < 2:
        yield
        return
    talk(variable("RANK") == 0)  # what all would say, the first says for all
    try:
        current = World()
        with open(os.devnull, "w", encoding="utf-8") as nowhere, _first_prints(nowhere):
            yield
        current.meet()
    except BaseException as error:
        _no_world(error) if current is None else current.end(error)
    finally:
        current = None
        talk(True)


def _first_prints(nowhere: TextIO) -> AbstractContextManager[object]:
    return redirect_stdout(nowhere) if variable("RANK") else nullcontext()


def _no_world(error: BaseException) -> NoReturn:
    """End this process, and by that all, where it could not meet them."""
    if isinstance(error, KeyboardInterrupt):  # MPI's own end would wait for the others
        os._exit(128 + getattr(error, "number", 2))
    if not isinstance(error, InputError):
        raise error
    if variable("LOCAL_RANK"):  # a line a machine, whose end is that of all
        time.sleep(2 * _ANSWERS_S)
    talk(True)
    say(f"error: {error}")
    raise SystemExit(2) from error


class World:
    """All of these processes, each of which has a number, its rank."""

    def __init__(self) -> None:
        """
        Raises:
            InputError: where mpi4py is missing, or does not fit this `mpirun`.
        """
        count = variable("SIZE", 1)
        # It waits for all processes, and nothing of Python runs meanwhile: so a process that does
        # not come ends this one, of which mpirun tells.
        signal.alarm(int(_COMES_S))
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # it is missing, or finds no MPI
            raise InputError(
                f"mpirun has started {count} processes, which need mpi4py to work together "
                f"({message_of(error)}): pip install mpi4py, or start one process"
            ) from error
        finally:
            signal.alarm(0)
        self._mpi, self._all = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._all.rank, self._all.size
        if self.size != count:
            raise InputError(
                f"mpirun has started {count} processes, but mpi4py knows of {self.size}: it uses "
                f"another MPI ({MPI.Get_library_version().split(',')[0].strip()})"
            )
        self._sent: list[Any] = []  # messages of a roll-call, kept until they are gone
        self.limit_s = _COMES_S
        self.starting = True  # until all have all that the first step needs
        self.doing = "the start"  # what all do now, for the line that says who is missing
        self.advice = "start them again"  # what that line says is to be done

    def exchange(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Tell all ranks something, fit for JSON, and get what each tells, in their order.

        While the run starts, a rank that has failed says so here: then all end.
        """
        given = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        self.wait(self._all.Iallgather(np.array([len(given)], np.int64), lengths))
        whole, ends = np.zeros(lengths.sum(), np.uint8), lengths.cumsum()
        places = (lengths.tolist(), (ends - lengths).tolist())
        self.wait(self._all.Iallgatherv(given, [whole, places, self._mpi.BYTE]))
        parts = (whole[end - n : end] for n, end in zip(lengths, ends, strict=True))
        told = [json.loads(part.tobytes()) for part in parts]
        if faults := {i: each["error"] for i, each in enumerate(told) if "error" in each}:
            self._leave(faults)
        left = [i for i, each in enumerate(told) if "left" in each]
        if 0 < len(left) < self.size:
            self._leave({0: f"rank {left[0]} was to show its help, and another was not"})
        return told

    def need_same(self, facts: Mapping[str, str]) -> None:
        """End all where a rank's facts are not those of the first: told of the first that differs.

        Args:
            facts: what has to be the same -> what it is here, in words.
        """
        told = self.exchange(facts)
        for name in facts:
            for rank, theirs in enumerate(told):
                if (other := theirs.get(name)) != told[0].get(name):
                    self._leave({0: f"{name}: rank {rank} has {other}, rank 0 {told[0][name]}"})

    def _leave(self, faults: Mapping[int, str]) -> NoReturn:
        """End in order, all at once, with an error of which one rank tells."""
        first = min(faults)
        if self.rank == first:
            self._tell(faults[first], named=first > 0)
        raise _Left(2)

    def _tell(self, message: str, named: bool = True) -> None:
        talk(True)
        say(f"error: rank {self.rank}: {message}" if named else f"error: {message}")

    def end(self, error: BaseException) -> NoReturn:
        """End this process, and by that all, with what has gone wrong in it."""
        if isinstance(error, SystemExit) and self.starting and not isinstance(error, _Left):
            self.exchange({"left": error.code})  # as all do, with the help
            raise error
        if isinstance(error, _Left):
            raise error
        if isinstance(error, Agreed):
            self._leave({0: str(error)})
        with suppress(Exception):
            sys.stdout.flush()
        if isinstance(error, KeyboardInterrupt):
            os._exit(128 + getattr(error, "number", 2))
        if self.starting:
            try:
                self.exchange({"error": _why(error)})
            except _Left:
                raise
            except Exception as other:  # nor do they come
                error = other
        if isinstance(error, _Unheard):
            time.sleep(2 * _ANSWERS_S)  # for the line of another, with which all end
        else:
            if self.rank:  # where all have come to the same, the first tells
                time.sleep(_LETS_S)
            self._tell(_why(error))
        os._exit(2)

    def total(self, array: np.ndarray, part_bytes: int | None = None) -> None:
        """Replace numbers by their sums over all ranks, in place.

        Args:
            part_bytes: how many are sent at once.
        """
        step = max(1, (part_bytes or array.nbytes) // array.itemsize)
        parts = [array[i : i + step] for i in range(0, len(array), step)]
        self.wait(*[self._all.Iallreduce(self._mpi.IN_PLACE, part) for part in parts])

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.wait(self._all.Ibarrier())

    def spread(self, array: np.ndarray) -> None:
        """Replace an array by that of rank 0, in place."""
        self.wait(self._all.Ibcast(array, root=0))

    def wait(self, *requests: Any) -> None:
        """Wait for messages, as long as the limit allows.

        Raises:
            InputError: naming who is missing, in the first of those that are not.
        """
        looked, waited = time.monotonic(), 0.0
        while not self._mpi.Request.Testall(requests):
            if (gap := time.monotonic() - looked) > _LOOKS_S:
                looked += gap
                waited += min(gap, 10 * _LOOKS_S)  # a longer one is a machine that was asleep
                if waited > self.limit_s or self._all.Iprobe(tag=_ROLL_CALL):
                    self._call_the_roll(waited)
            if waited < _SPINS_S:
                os.sched_yield()
            else:
                time.sleep(0.001)

    def _call_the_roll(self, waited_s: float) -> NoReturn:
        """Find out who waits too; of these, the first tells who does not."""
        self.starting = False  # whoever is missing cannot be told of it
        heard, nothing = {self.rank}, np.zeros(0, np.uint8)
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._sent = [self._all.Isend(nothing, rank, _ROLL_CALL) for rank in others]
        begun = time.monotonic()
        while time.monotonic() - begun < _ANSWERS_S and len(heard) < self.size:
            status = self._mpi.Status()
            if self._all.Iprobe(tag=_ROLL_CALL, status=status):
                self._all.Recv(nothing, status.source, _ROLL_CALL)
                heard.add(status.source)
            time.sleep(0.01)
        if self.rank != min(heard):
            raise _Unheard
        missing = [str(rank) for rank in others if rank not in heard]
        if not missing and waited_s < self.limit_s / 2:  # the one whom the others have waited for
            raise _Unheard
        who = f"rank {' and '.join(missing)} did" if missing else "a message did"
        raise InputError(
            f"{who} not come to {self.doing} within {waited_s:.0f} s (stopped, cut off, or slower "
            f"than the others); {self.advice}"
        )


def _why(error: BaseException) -> str:
    """What is told of an error, and for one that nobody has foreseen, where it was."""
    if isinstance(error, SystemExit):
        return f"the program was ended by sys.exit({error.code})"
    if isinstance(error, InputError | OSError | MemoryError):
        return message_of(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message_of(error)} ({os.path.basename(place.filename)}, line {place.lineno})"


class Agreed(InputError):
    """What every rank has come to by the same numbers, and the first tells."""


class _Left(SystemExit):
    """The end of all ranks at once, which has been told."""


class _Unheard(Exception):
    """Another rank tells what has happened."""
