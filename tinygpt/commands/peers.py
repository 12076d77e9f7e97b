"""The programs that `bench` compares, each in a process of its own that reports how fast it was.

Both ends of the conversation are here, `Contender`, which asks, and `serve`, which answers, each
with a line of JSON; and so are the drivers of the other implementations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.checkpoints.save_gguf import save_gguf
from tinygpt.generator import Generator
from tinygpt.model import GPT
from tinygpt.runtime import device


class Ours:
    """tinygpt itself; with TINYGPT_KERNELS=0 in the environment, stock tinygrad."""

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        # tinygrad takes the number of threads from CPU_COUNT in the environment.
        self.generator = Generator(GPT.from_pretrained(folder, dtype=dtype))

    def generate(self, prompts: list[list[int]], count: int) -> Iterator[list[int]]:
        """At each of `count` steps the likeliest next id of each row; prompts of one length."""
        return self.generator.generate_batch(prompts, count, temperature=0)


class Transformers:
    """The `transformers` package, on the CPU: its model in a loop, without `generate`'s extras."""

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(threads)
        self.torch = torch
        model = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
        self.model = model.to(getattr(torch, dtype)).eval()

    def generate(self, prompts: list[list[int]], count: int) -> Iterator[list[int]]:
        """As `Ours.generate`."""
        tokens, past = self.torch.tensor(prompts), None
        for _ in range(count):
            with self.torch.inference_mode():  # must not be entered while this yields
                out = self.model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)  # (B, 1)
            yield tokens[:, 0].tolist()


class LlamaCpp:
    """llama.cpp, on the CPU, through the C functions in the package `llama-cpp-python`.

    `Llama`, that package's class, has no batches, and takes memory for logits nobody asks for.
    """

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        import llama_cpp

        self.lib, self.threads, self.contexts = llama_cpp, threads, {}
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the GGUF file")
        self.window = llama_cpp.llama_model_n_ctx_train(self.model)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def generate(self, prompts: list[list[int]], count: int) -> Iterator[list[int]]:
        """As `Ours.generate`."""
        context = self._context(len(prompts))
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), False)
        rows, position = prompts, 0
        for _ in range(count):
            chosen = self._decode(context, rows, position)
            rows, position = [[token] for token in chosen], position + len(rows[0])
            yield chosen

    def _context(self, batch_size: int) -> Any:
        """What holds the KV cache: a window for each row, all else as llama.cpp has it."""
        if batch_size not in self.contexts:
            params = self.lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = self.window * batch_size, batch_size
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[batch_size] = self.lib.llama_init_from_model(self.model, params)
        return self.contexts[batch_size]

    def _decode(self, context: Any, rows: list[list[int]], position: int) -> list[int]:
        length = len(rows[0])
        batch = self.lib.llama_batch_init(len(rows) * length, 0, 1)
        batch.n_tokens = len(rows) * length
        for i in range(batch.n_tokens):
            row, column = divmod(i, length)
            batch.token[i], batch.pos[i] = rows[row][column], position + column
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = column == length - 1
        try:
            if status := self.lib.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode gives {status}")
        finally:
            self.lib.llama_batch_free(batch)
        ends = range(length - 1, len(rows) * length, length)
        return [int(self._logits(context, i).argmax()) for i in ends]

    def _logits(self, context: Any, i: int) -> np.ndarray:
        pointer = self.lib.llama_get_logits_ith(context, i)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))


FAMILIES = {
    "tinygpt": Ours,
    "stock tinygrad": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}


class Contender:
    """One of those compared: a process that starts, and loads its model, when first asked."""

    def __init__(self, family: str, dtype: str, folder: Path, threads: int) -> None:
        """
        Args:
            family: one of FAMILIES.
            dtype: of the weights.
            folder: the model's, in Hugging Face form.
        """
        self.name, self.family, self.dtype = f"{family} {dtype}", family, dtype
        self.folder, self.threads = folder, threads
        self.process: subprocess.Popen[bytes] | None = None
        self.temporary: tempfile.TemporaryDirectory | None = None

    def ask(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Let it continue the prompts, all of one length, by `count` greedy tokens.

        Returns:
            the seconds `first_s` and, for the later tokens, `rest_s`; `tokens`, a row for each
            step; `peak_memory_bytes`, or None where the system does not say.
        Raises:
            RuntimeError: when it dies instead, with its last words.
        """
        if self.process is None:
            self._start()
        with suppress(BrokenPipeError):
            line = json.dumps({"prompts": prompts, "count": count}) + "\n"
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        if reply := self.process.stdout.readline():
            return json.loads(reply)
        status = self.process.wait()
        lines = (self.place / "stderr").read_text(errors="replace", encoding="utf-8").splitlines()
        raise RuntimeError(next(filter(str.strip, reversed(lines)), f"exit status {status}"))

    def _start(self) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="tinygpt-bench-")
        self.place, path = Path(self.temporary.name), self.folder
        if self.family == "llama.cpp":
            path = self.place / "gguf"
            model = GPT.from_pretrained(self.folder, dtype="float32")
            save_gguf(model, path, dtype=self.dtype)
        # tinygrad and some other libraries read their number of threads when they are imported.
        changes = {"CPU_COUNT": str(self.threads), "OMP_NUM_THREADS": str(self.threads)}
        if self.family == "stock tinygrad":
            changes["TINYGPT_KERNELS"] = "0"
        arguments = [self.family, str(path), self.dtype, str(self.threads)]
        with open(self.place / "stderr", "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tinygpt.commands.peers", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**environment(), **changes},
            )

    def close(self) -> None:
        """End the process, whatever it is doing, and remove its files."""
        if self.process:
            self.process.kill()
            with suppress(BrokenPipeError):  # it may not have read the last request
                self.process.communicate()
        if self.temporary:
            self.temporary.cleanup()


def environment() -> dict[str, str]:
    """For a Python that is to find the packages that this one has found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def serve(family: str, path: str, dtype: str, threads: str) -> None:
    """Load a model, then do and time what each line on stdin asks for: see `Contender.ask`."""
    device.forgive_cache()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print apart from the replies
    contender = FAMILIES[family](path, dtype, int(threads))
    for line in sys.stdin:
        print(json.dumps(_timed(contender, **json.loads(line))), file=replies, flush=True)


def _timed(contender: Any, prompts: list[list[int]], count: int) -> dict[str, Any]:
    start = time.perf_counter()
    steps = contender.generate(prompts, count)
    tokens = [next(steps)]
    first = time.perf_counter()
    tokens += steps
    end = time.perf_counter()
    times = {"first_s": first - start, "rest_s": end - first}
    return {**times, "tokens": tokens, "peak_memory_bytes": _peak_memory_bytes()}


def _peak_memory_bytes() -> int | None:
    """The most memory this process has had at once; None if the system does not say."""
    with suppress(OSError, StopIteration):
        # On Linux, getrusage would also count the process that started this one.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) * 1024
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


if __name__ == "__main__":
    serve(*sys.argv[1:])
