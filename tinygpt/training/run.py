"""The training loop: steps, evaluations, checkpoints, a log, and an orderly end."""

from __future__ import annotations

import math
import os
import statistics
import time
from contextlib import suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

from tinygrad import Tensor

from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.checkpoints.quantization import check_dtype, convert
from tinygpt.data.dataset import Batches, Dataset
from tinygpt.devices import copy_to_all
from tinygpt.errors import CheckpointError, InputError, reason, say
from tinygpt.generator import Generator
from tinygpt.model import GPT
from tinygpt.storage import open_plain
from tinygpt.tokenizer.encoding import end_token
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.training import run_files
from tinygpt.training.progress import Progress, duration
from tinygpt.training.ranks import Alone, Differing, need_even
from tinygpt.training.settings import MOST, TrainConfig
from tinygpt.training.state import State
from tinygpt.training.step import Batch, Counters, Trainer, sharing_weights
from tinygpt.training.validation import Validation
from tinygpt.training.world import Agreed

# So many steps in a row without a finite loss end a run. float16 may need some to find its scale.
_MOST_SKIPPED = 10
# --minutes fits the schedule after so many steps, of which the first are slower.
_TIMED, _UNTIMED = 20, 5


class _Stopped(Exception):
    """A signal has asked for an end."""


class Run:
    """One run of training in its folder: what `tinygpt train` does."""

    def __init__(
        self,
        folder: Path,
        data: Dataset,
        tokenizer: Tokenizer,
        model: GPT,
        config: TrainConfig,
        minutes: float | None = None,
        ranks: Alone | None = None,
        devices: int = 1,
    ) -> None:
        """
        Args:
            folder: where checkpoints and the log go, in rank 0.
            model: updated in place.
            minutes: fit the number of steps to this time; None keeps the configuration's.
            ranks: the processes that share the run; None for this one alone.
            devices: how many of this machine's share each batch.
        """
        self.folder, self.data, self.tokenizer = folder, data, tokenizer
        self.minutes, self.ranks = minutes, ranks or Alone()
        self.ranks.check_batch(config.batch_size)
        need_even(config.batch_size, devices, "devices")
        copy_to_all(model, devices)
        self.validation = Validation(model, data, config, self.ranks)
        check_dtype(config.dtype)
        self.trainer = Trainer(model, config, self.ranks)
        shape = config.batch_size, config.block_size
        self.batches = Batches(data.train, *shape, config.seed, config.order)
        self.generator = Generator(model)
        self.best: dict[str, Any] | None = None  # the step of the lowest validation loss, and it
        self.val_loss: float | None = None
        self.sample = ""  # what it wrote at the last evaluation
        self.times: list[float] = []  # seconds of this process's steps
        self.started = time.perf_counter()
        self.saved, self.evaluated = 0, False  # the last checkpoint's step; whether this one was

    @property
    def config(self) -> TrainConfig:
        """The run's settings, of which --minutes changes `steps` once."""
        return self.trainer.config

    @property
    def signal(self) -> int | None:
        """Set by whoever wants the run to end before its next batch."""
        return self.ranks.asked

    @signal.setter
    def signal(self, number: int | None) -> None:
        self.ranks.asked = number

    @property
    def counters(self) -> Counters:
        """How far the run is."""
        return self.trainer.counters

    @classmethod
    def resume(
        cls,
        folder: Path,
        data: Dataset,
        steps: int | None = None,
        minutes: float | None = None,
        last: Path | None = None,
        ranks: Alone | None = None,
        devices: int = 1,
    ) -> Run:
        """The run as its last checkpoint left it.

        Args:
            steps: how many it is to have in all from now on; None keeps its number. The learning
                rate goes on as if it had been this from the beginning.
            minutes: how long it is to go on; None keeps to the steps.
            last: what `run_files.newest` gave, None to ask it.
        Raises:
            InputError: when there is none, it is damaged, it was made with other data, or it has
                made so many steps already.
        """
        last = last or run_files.newest(folder)
        model, arrays, state = run_files.load(last)
        config, counters, left = state.config, state.counters, state.minutes
        if state.source != data.header.source:
            raise InputError(f"{folder} was trained on other data than {data.folder}: pass those")
        tokenizer = load_tokenizer(last)
        data.check(model.config.vocab_size, tokenizer)
        if steps is not None:
            if steps <= counters.step:
                raise InputError(
                    f"--steps is {steps}, but {folder} has made {counters.step} steps already: "
                    "give how many it is to have in all"
                )
            config, left = replace(config, steps=steps), None
        left = left if minutes is None else minutes
        run = cls(folder, data, tokenizer, model, config, left, ranks, devices)
        run_files.restore(run.tensors, arrays, last)
        run.follow(state)
        run._name_best()  # in case the program was ended between the two names
        run.evaluated = run_files.cut_log(folder, counters.step)
        return run

    def follow(self, state: State) -> None:
        """Go on from a state, of which the tensors are given otherwise."""
        self.trainer.counters, self.best = state.counters, state.best
        self.batches.restore(state.data)
        self.saved = state.counters.step

    def go(self) -> int | None:
        """Train to the end, or until `signal` is set; what it was set to.

        Raises:
            InputError: when something cannot be read or written, or the loss is no number. As after
                a signal, what can be is saved: the last whole step.
        """
        path, mode = self.folder / run_files.LOG, "a" if self.counters.step else "w"
        progress = Progress()
        try:
            if self.ranks.rank:  # the first writes
                path = Path(os.devnull)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    open_plain(path).close()
            with FileIO(path, mode) as log:  # nothing is kept that fails once more
                try:
                    self._go(log, progress)
                except (_Stopped, InputError, OSError) as error:
                    progress.clear()
                    if self.saved != self.counters.step and not isinstance(error, Differing):
                        self._save()
                    saved = ""
                    if self.saved:
                        saved = f"; step {self.saved} is saved, from which --resume goes on"
                    if isinstance(error, OSError):
                        raise InputError(f"cannot write {path}: {reason(error)}{saved}") from error
                    if isinstance(error, CheckpointError):
                        raise CheckpointError(f"{error}{saved}") from error
                    if isinstance(error, InputError):
                        raise
        except OSError as error:
            raise InputError(f"cannot write {path}: {reason(error)}") from error
        return self.signal

    def _go(self, log: FileIO, progress: Progress) -> None:
        if self._is_due() and not self.evaluated:
            self._evaluate(log, progress)  # a new run, or one that was stopped before it
        while not self.finished:
            self._step(log, progress)
            fit = self.minutes is not None and len(self.times) == _TIMED
            if fit or self._is_due():
                self._evaluate(log, progress)
            elif self.config.keep_every and self.counters.step % self.config.keep_every == 0:
                self._save()
        progress.clear()

    def _is_due(self) -> bool:
        """Whether a step ends with an evaluation."""
        return self.finished or self.counters.step % self.config.eval_every == 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the model, all of it in float32.

        Where the model is kept in fewer bits, that is also its weights as they are trained.
        """
        kept = self.trainer.tensors
        if self.config.dtype != "float32":
            kept |= {f"{name}.master": weight for name, weight in self.trainer.weights.items()}
        return kept

    @property
    def finished(self) -> bool:
        """Whether all of its steps are made."""
        return self.minutes is None and self.counters.step >= self.config.steps

    def _step(self, log: FileIO, progress: Progress) -> None:
        start = time.perf_counter()
        config = self.config
        rate = self.trainer.learning_rate
        outcome = self.trainer.step(self._next() for _ in range(config.accumulate))
        self.evaluated = False
        self.times.append(time.perf_counter() - start)
        step, recent = self.counters.step, statistics.median(self.times[-20:])
        entry = {"step": step, "loss": outcome.loss, "norm": outcome.norm, "learning_rate": rate}
        entry["tokens"] = outcome.tokens
        if not outcome.good:
            entry["skipped"] = True
        tokens = config.accumulate * config.batch_size * config.block_size
        run_files.add_entry(log, {**entry, "tokens_per_s": round(tokens / recent)})
        left = recent * max(0, config.steps - step)
        if self.minutes is None and len(self.times) == _TIMED:
            say(f"about {duration(left)} left, for {config.steps - step} steps")
        progress.show(step, config.steps, outcome.loss, self.val_loss, tokens / recent, left)
        if self.counters.skipped_in_a_row == _MOST_SKIPPED:
            raise Agreed(
                f"the loss or its gradient was not finite in {_MOST_SKIPPED} steps in a row, to "
                f"step {step}: the weights as they were before those are in "
                f"{self.folder / 'last'}; try a lower --learning-rate"
            )

    def _next(self) -> Batch:
        self._need_going_on()
        return next(self.batches)

    def _need_going_on(self) -> None:
        if self.ranks.stopping:
            raise _Stopped

    def _evaluate(self, log: FileIO, progress: Progress) -> None:
        """Measure and sample, save, and then log: what the log has, no resumed run does again."""
        begun = time.perf_counter()
        config, step = self.config, self.counters.step
        self.ranks.compare(self.trainer.weights, step)
        self.val_loss = self.validation.loss(self._need_going_on)
        entry = {"step": step, "val_loss": self.val_loss}
        if config.sample_tokens and self.ranks.rank == 0:
            start = end_token(self.tokenizer) or 0
            how = config.sample_tokens, config.seed
            ids = []
            for i in self.generator.generate([start], *how, temperature=config.sample_temperature):
                self._need_going_on()
                ids.append(i)
            self.sample = entry["sample"] = self.tokenizer.decode(ids)
        lowest = self.best["val_loss"] if self.best else math.inf
        if step and self.val_loss < lowest:  # which what is no number is not
            self.best = {"step": step, "val_loss": self.val_loss}
        if self.minutes is not None and len(self.times) == _TIMED:
            self._fit(time.perf_counter() - begun)
        if step:
            self._save()
        run_files.add_entry(log, entry)
        self.evaluated = True
        progress.clear()
        say(f"step {step}: validation loss {self.val_loss:.4f}")
        if config.sample_tokens:
            say(f"a sample of {config.sample_tokens} tokens:", below=self.sample)

    @property
    def state(self) -> State:
        """What to go on with from the last whole step, besides tensors."""
        # A part of the next may be taken.
        position = {"step": self.counters.step * self.config.accumulate}
        place = self.batches.state() | position
        source = self.data.header.source
        return State(self.counters, self.best, place, source, self.minutes, self.config)

    def _save(self) -> None:
        if self.ranks.rank == 0:
            model = self.trainer.model
            if self.config.dtype != "float32":
                model = convert(sharing_weights(model, model.config), self.config.dtype)
            run_files.save(self.folder, model, self.tokenizer, self.tensors, self.state)
        self.saved = self.counters.step
        if self.ranks.rank == 0:
            self._name_best()
            run_files.prune(self.folder, self.config.keep, self.config.keep_every)

    def _name_best(self) -> None:
        if self.best is not None:
            best = self.folder / run_files.step_name(self.best["step"])
            if best.is_dir():
                run_files.point(self.folder, "best", best)

    def _fit(self, evaluation_s: float) -> None:
        """Choose the number of steps such that they end when the minutes do."""
        took = statistics.median(self.times[_UNTIMED:]) + evaluation_s / self.config.eval_every
        left = self.minutes * 60 - (time.perf_counter() - self.started)
        took, left, step = *map(self.ranks.of_first, (took, left)), self.counters.step
        steps = min(step + max(1, int(left / took)), MOST)
        warmup_steps = min(self.config.warmup_steps, max(step, steps // 10))
        self.trainer.config = replace(self.config, steps=steps, warmup_steps=warmup_steps)
        say(f"{steps} steps fit into {self.minutes:g} minutes, at {took * 1e3:.0f} ms each")
        self.minutes = None
