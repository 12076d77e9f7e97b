"""The thread that runs the model: texts wait in a queue, take a slot, give tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from tinygpt.logprobs import Token
from tinygpt.model import GPT
from tinygpt.sampling import Sampling
from tinygpt.slots import Slots


@dataclass(eq=False)
class Job:
    """One text to be continued. What comes of it goes to `tell`, in the engine's thread."""

    ids: list[int]
    max_tokens: int
    tell: Callable[[Token | Exception | None], None]  # None: that was the last
    settings: Sampling = field(default_factory=Sampling)
    seed: int = 0
    top: int | None = None
    bias: Mapping[int, float] | None = None
    scores: bool = False
    written: int = 0  # how many of the last ids count as written
    ends: frozenset[int] = frozenset()  # ids that end it; such a one is told too
    cancelled: bool = False
    told: int = 0  # tokens so far

    def begin(self, slots: Slots) -> int:
        """Start the text; its slot."""
        how = self.settings, self.seed, self.top, self.bias, self.scores, self.written
        return slots.start(self.ids, *how)

    def take(self, token: Token, vocab_size: int, end: Callable[[], None]) -> None:
        """Tell a token; where it is the last, free the slot by `end` before anybody hears of it."""
        self.told += 1
        if not 0 <= token.token < vocab_size and self.max_tokens:
            end()
            self.tell(NotNumbers())
            return
        last = self.told >= self.max_tokens or token.token in self.ends
        if last:
            end()
        self.tell(token)
        if last:
            self.tell(None)


@dataclass(eq=False)
class Call:
    """Something to be computed between two steps; both functions must not raise."""

    run: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda error: None  # where it is not run any more
    cancelled: bool = False


class Full(Exception):
    """No more texts can wait."""


class Draining(Exception):
    """The program is about to end."""


class NotNumbers(Exception):
    """The model's logits of one text were no finite numbers."""


class Engine:
    """Slots, and the queue in front of them. All of its methods may be called by any thread."""

    def __init__(self, model: GPT, slots: int, queue: int) -> None:
        """
        Args:
            model: it is the caller's to keep.
            slots: how many texts run side by side.
            queue: how many more may wait.
        """
        self.model, self.queue = model, queue
        self.slots = Slots(model, slots, serving=True)
        self.ready = threading.Event()  # everything is compiled, or
        self.failed: Exception | None = None  # why that was not possible
        self.running: dict[int, Job] = {}
        self.waiting: deque[Job] = deque()
        self.calls: deque[Call] = deque()
        self.calling: Call | None = None  # that is computed by now
        self.draining = False
        self.steps = 0  # how often `Slots.step` ran: at most one chunk and a token of each
        self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile all that there is to compile, then take texts; returns at once."""
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Let some texts wait for a slot, all or none of them.

        Raises:
            Full: when so many cannot wait.
            Draining: when the program is about to end.
        """
        with self._changed:
            if self.draining:
                raise Draining
            free = self.slots.n - len(self.running)
            if len(self.waiting) + len(jobs) > self.queue + free:
                raise Full
            self.waiting += jobs
            self._changed.notify()

    def call(self, call: Call) -> None:
        """Let something be computed in this thread; one such between two steps."""
        with self._changed:
            self.calls.append(call)
            self._changed.notify()

    @property
    def busy(self) -> bool:
        """Whether a text runs, or something is computed between its steps."""
        with self._changed:
            return bool(self.running or self.calls or self.calling)

    def cancel(self, jobs: list[Job]) -> None:
        """End texts that nobody waits for any more."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more texts, and end those that wait; those that run go on."""
        with self._changed:
            self.draining = True
            waiting, self.waiting = list(self.waiting), deque()
            calls, self.calls = list(self.calls), deque()
            self._changed.notify()
        for job in waiting:
            job.tell(Draining())
        for call in calls:
            call.refuse(Draining())

    def stop(self) -> None:
        """End the thread, once its step is done."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.slots.compile()
        except Exception as error:
            self.failed = error
            return
        finally:
            self.ready.set()
        while True:
            with self._changed:
                while not (self._stop or self.waiting or self.running or self.calls):
                    self._changed.wait()
                if self._stop:
                    return
                while self.calls and self.calls[0].cancelled:
                    self.calls.popleft()
                self.calling = call = self.calls.popleft() if self.calls else None
                self._sweep()
                failed = self._begin()
            if call is not None:
                call.run()
                self.calling = None
            for job, why in failed:
                job.tell(why)
            if self.running:
                self._step()

    def _sweep(self) -> None:
        """Free the slots of texts that were cancelled."""
        for slot, job in list(self.running.items()):
            if job.cancelled:
                self._end(slot)

    def _begin(self) -> list[tuple[Job, Exception]]:
        """Give free slots to those that have waited longest; those that cannot begin, and why."""
        failed = list[tuple[Job, Exception]]()
        while self.waiting and self.slots.free:
            job = self.waiting.popleft()
            try:
                self.running[job.begin(self.slots)] = job
            except Exception as error:
                failed.append((job, error))
        return failed

    def _step(self) -> None:
        """One chunk of a prompt, and one token of each text that runs."""
        self.steps += 1
        try:
            found = self.slots.step()
        except Exception as error:  # whatever it is, it ends these texts and not the program
            for slot, job in list(self.running.items()):
                self._end(slot)
                job.tell(error)
            self.slots.clear()
            return
        for slot, token in found.items():
            vocab_size = self.model.config.vocab_size
            self.running[slot].take(token, vocab_size, partial(self._end, slot))

    def _end(self, slot: int) -> None:
        self.slots.stop(slot)
        del self.running[slot]
