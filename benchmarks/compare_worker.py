"""One side of one work of compare.py: a process that times turns of a checkout's package.

It is started in the checkout, with the checkout first on Python's path.

A class below is made once; `turn(number)` then gives the seconds of one unit of the work and what
came out. Both sides get the same numbers, and so the same prompts and batches.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path.cwd()
PROMPT = "To be, or not to be"
VOCABULARY = 65  # of the characters in Shakespeare's plays, as in training.py
LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8}


class Generate:
    """Continues prompts: the time to the first token or, of more than one, of each later one."""

    def __init__(self, model: str, dtype: str | None, length: int, count: int, **more: Any) -> None:
        """
        Args:
            model: a folder, or the name of the built-in one, which gets PROMPT instead of ids.
            length: of the prompts.
            count: how many tokens to choose for each.
            more: `batch_size`, and settings of sampling.
        """
        from tinygpt import GPT, Generator, load_tokenizer

        gpt = GPT.from_pretrained(model, dtype=dtype)
        self.generator, self.vocab_size = Generator(gpt), gpt.config.vocab_size
        self.batch_size, self.length, self.count = more.pop("batch_size", 1), length, count
        self.sampling = {"temperature": 0, **more}
        self.prompt = None if Path(model).is_dir() else load_tokenizer("bytes").encode(PROMPT)

    def turn(self, number: int) -> tuple[float, list]:
        rng = np.random.default_rng(number)
        drawn = rng.integers(self.vocab_size, size=(self.batch_size, self.length)).tolist()
        prompts = drawn if self.prompt is None else [self.prompt]
        start = time.perf_counter()
        steps = self.generator.generate_batch(
            prompts, max_new_tokens=self.count, seed=number, **self.sampling
        )
        tokens = [next(steps)]
        first = time.perf_counter()
        tokens += steps
        if self.count == 1:
            return first - start, tokens
        return (time.perf_counter() - first) / (self.count - 1), tokens


class Train:
    """Steps of training on random characters, at the shapes of training.py."""

    def __init__(self, large: bool, dropout: float, torch: bool = False) -> None:
        from tinygpt import GPT

        if Path("tinygpt", "training").is_dir():
            from tinygpt.training.settings import RECIPES, TrainConfig
            from tinygpt.training.step import Trainer
        else:  # before modules had folders
            from tinygpt.recipes import RECIPES, TrainConfig
            from tinygpt.trainer import Trainer
        config = TrainConfig.of(RECIPES["shakespeare-cpu"], {"dropout": dropout})
        config = replace(config, **LARGE) if large else config
        shape = 64, config.batch_size, config.block_size + 1
        self.batches = np.random.default_rng(0).integers(VOCABULARY, size=shape, dtype=np.int32)
        self.steps, self.done = 2 if large else 10, 0
        if torch:
            from training import Torch

            self.step = Torch(config).step
        else:
            trainer = Trainer(GPT(config.gpt_config(VOCABULARY), config.seed), config)
            self.step = lambda inputs, targets: trainer.step([(inputs, targets)]).loss

    def turn(self, number: int) -> tuple[float, list]:
        losses, start = [], time.perf_counter()
        for _ in range(self.steps):
            batch = self.batches[self.done % len(self.batches)]
            inputs, targets = (np.ascontiguousarray(part) for part in (batch[:, :-1], batch[:, 1:]))
            losses.append(self.step(inputs, targets))
            self.done += 1
        return (time.perf_counter() - start) / self.steps, losses


class Start:
    """The whole program: from its start to the first character that it writes."""

    def __init__(self, cold: bool) -> None:
        """
        Args:
            cold: with empty caches each time; else with what an earlier start has compiled.
        """
        # A worker's working folder is its checkout.
        self.command = [sys.executable, "run.py", PROMPT, "--seed", "1", "--max-new-tokens", "1"]
        self.cold, self.caches = cold, tempfile.TemporaryDirectory(prefix="tinygpt-compare-")

    def turn(self, number: int) -> tuple[float, list]:
        folder = Path(self.caches.name, str(number if self.cold else 0))
        folder.mkdir(exist_ok=True)
        settings = {"CACHEDB": str(folder / "kernels.db"), "XDG_CACHE_HOME": str(folder)}
        start = time.perf_counter()
        with subprocess.Popen(
            self.command, env={**os.environ, **settings}, stdout=-1, stderr=-1
        ) as process:
            text = process.stdout.read(len(PROMPT) + 1)  # the program shows the prompt first
            seconds = time.perf_counter() - start
            _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors.decode(errors="replace").strip())
        return seconds, [text.decode()]


PROGRAMS = {"generate": Generate, "train": Train, "start": Start}


def serve(program: str, arguments: str) -> None:
    """Answer each line of stdin, the number of a turn, with a line of JSON."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    worker = PROGRAMS[program](**json.loads(arguments))
    for line in sys.stdin:
        seconds, made = worker.turn(int(line))
        check_origin()
        reply = {"s": seconds, "made": made, "peak_bytes": peak_bytes(program == "start")}
        print(json.dumps(reply), file=replies, flush=True)


def check_origin() -> None:
    """See that all of the package came from the checkout, which is the working folder.

    An editable install of another checkout would give whatever modules this one lacks.
    """
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "tinygpt" and not Path(module.__file__).is_relative_to(HERE):
            raise RuntimeError(f"{name} comes from {module.__file__}, not from {HERE}")


def peak_bytes(children: bool) -> int | None:
    """The most memory that this process, or one it started, has had at once."""
    if children:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) * 1024
    return None


if __name__ == "__main__":
    serve(*sys.argv[1:])
