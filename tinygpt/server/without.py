"""Texts without parts of the model, one at a time, between the steps of the engine's own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from tinygpt.server.engine import Call, Draining, Engine, Full, Job
from tinygpt.slots import Slots
from tinygpt.study.without import Without


@dataclass(eq=False)
class _Text:
    job: Job
    heads: Collection[tuple[int, int]]
    blocks: Collection[int]


class Reduced:
    """The queue of such texts. What it holds of the model is made when it is first needed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: deque[_Text] = deque()
        self.running: tuple[_Text, int] | None = None  # and its slot
        self._without: Without | None = None
        self._turning = False
        self._lock = threading.Lock()

    def without(self, heads: Collection[tuple[int, int]], blocks: Collection[int]) -> Partial:
        """What takes texts that do without these parts, as an engine does."""
        return Partial(self, heads, blocks)

    def submit(self, texts: list[_Text]) -> None:
        """Let texts wait.

        Raises:
            Full, Draining: as of an engine.
        """
        if self.engine.draining:
            raise Draining
        with self._lock:
            if len(self.waiting) + len(texts) > self.engine.queue + 1:
                raise Full
            self.waiting += texts
            idle, self._turning = not self._turning, True
        if idle:
            self.engine.call(Call(self._turn, self._refuse))

    def _refuse(self, error: Exception) -> None:
        """What waits ends, and what runs goes on: its next step was taken from the queue."""
        with self._lock:
            waiting, self.waiting = list(self.waiting), deque()
        for text in waiting:
            text.job.tell(error)
        if self.running is not None:
            self.engine.call(Call(self._turn))

    def _turn(self) -> None:
        """One step, in the engine's thread; the next is asked for, as long as there is one."""
        while self.engine.draining and self.waiting:
            self.waiting.popleft().job.tell(Draining())
        if self.running is not None and self.running[0].job.cancelled:
            self._end()
        text: _Text | None = None
        try:
            while self.running is None and self.waiting:
                text = self.waiting.popleft()
                if not text.job.cancelled:
                    self._begin(text)
            if self.running is not None:
                text = self.running[0]
                self._step(text.job)
        except Exception as error:  # whatever it is, it ends this text and not the program
            if self.running is not None:
                self._end()
            if text is not None:
                text.job.tell(error)
        with self._lock:
            more = self._turning = self.running is not None or bool(self.waiting)
        if more:
            self.engine.call(Call(self._turn, self._refuse))

    def _begin(self, text: _Text) -> None:
        if self._without is None:
            self._without = Without(self.engine.model)
        self._without.leave_out(text.heads, text.blocks)
        self.running = text, text.job.begin(self._without.slots)

    def _step(self, job: Job) -> None:
        assert self._without is not None
        for token in self._without.slots.step().values():
            job.take(token, self.engine.model.config.vocab_size, self._end)

    def _end(self) -> None:
        assert self._without is not None
        assert self.running is not None
        self._without.slots.stop(self.running[1])
        self.running = None


class Partial:
    """The engine of one request."""

    def __init__(
        self, reduced: Reduced, heads: Collection[tuple[int, int]], blocks: Collection[int]
    ) -> None:
        self._reduced, self._heads, self._blocks = reduced, heads, blocks
        self.queue = reduced.engine.queue

    @property
    def slots(self) -> Slots:
        """For how many there are."""
        return self._reduced.engine.slots

    def submit(self, jobs: list[Job]) -> None:
        """As `Engine.submit`."""
        self._reduced.submit([_Text(job, self._heads, self._blocks) for job in jobs])

    def cancel(self, jobs: list[Job]) -> None:
        """As `Engine.cancel`."""
        for job in jobs:
            job.cancelled = True
