"""Compiles what an NVIDIA GPU would run, without a GPU, and counts it.

    python benchmarks/gpu_kernels.py [--write]

NVIDIA's own compiler, from the wheel `nvidia-cuda-nvrtc-cu12` (the extra `nvrtc`), takes each
kernel of generating, training and evaluating, for the processors of ARCHITECTURES, from a device
of tinygrad's that runs none. What is printed is, for each case, how many kernels one step starts
and how many bytes they touch, by tinygrad's count: a token of each text, a training step, an
evaluated batch. With --write that becomes `benchmarks/gpu_kernels.json`; without it the exit status
is 1 where a number is larger than there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

# A100 and H100. tinygrad writes the same text for both (the second has floats of 8 bits besides,
# which nothing here uses), so it is written once, for the first, and compiled for each.
ARCHITECTURES = ("sm_80", "sm_90")
TABLE = Path(__file__).with_name("gpu_kernels.json")

# All of it before tinygrad is imported.
os.environ["DEV"] = f"NULL:CUDA:{ARCHITECTURES[0]}"
os.environ["NULL_ALLOW_COPYOUT"] = "1"  # what comes back is zeros
os.environ["JIT"] = "2"  # each kernel is started, and so counted, by itself
wheel = find_spec("nvidia.cuda_nvrtc")
for place in (wheel and wheel.submodule_search_locations) or ():
    for file in Path(place, "lib").glob("libnvrtc.so.*"):
        os.environ.setdefault("NVRTC_PATH", str(file))
sys.path.insert(0, str(TABLE.parents[1]))

import numpy as np  # noqa: E402
from tinygrad import Device  # noqa: E402
from tinygrad.device import Compiler  # noqa: E402
from tinygrad.helpers import GlobalCounters  # noqa: E402
from tinygrad.runtime.support.compiler_cuda import NVRTCCompiler  # noqa: E402

from tinygpt import GPT, Generator, GPTConfig  # noqa: E402
from tinygpt.checkpoints.quantization import convert  # noqa: E402
from tinygpt.evaluation.losses import Scorer  # noqa: E402
from tinygpt.model import DTYPES  # noqa: E402
from tinygpt.training import step  # noqa: E402
from tinygpt.training.settings import TrainConfig  # noqa: E402

Count = tuple[int, int]  # kernels, bytes
SMALL = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=64, vocab_size=256)
FILTERS = {
    "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
    "frequency_penalty": 0.5, "presence_penalty": 0.5,
}  # fmt: skip
TRAIN = TrainConfig(n_layer=1, n_head=2, n_embd=64, block_size=32, batch_size=4)
TRAINING = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "lora": {"lora_rank": 4},
    "dropout": {"dropout": 0.1},
    "bfloat16": {"compute": "bfloat16"},
    "float16": {"compute": "float16"},
    "accumulate": {"accumulate": 2},
    "post-norm, sinusoidal, bias": {"norm": "post", "position": "sinusoidal", "bias": True},
}


class ForEach(Compiler):
    """Compiles for each architecture, and keeps nothing: an old result proves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.compilers = [NVRTCCompiler(architecture) for architecture in ARCHITECTURES]

    def compile(self, source: str) -> bytes:
        compiled = [compiler.compile(source) for compiler in self.compilers]
        return compiled[0]


def counted(run: Callable[[], object]) -> Count:
    """What one more run starts and touches."""
    GlobalCounters.reset()
    run()
    return GlobalCounters.kernel_count, int(GlobalCounters.global_mem)


def a_token(model: GPT, texts: int = 1, **sampling: float) -> Count:
    """A token of each text, after a prompt that is read in chunks of both sizes."""
    tokens = Generator(model, chunk_size=8).generate_batch(
        [[1] * 40] * texts, 4, seed=1, **sampling
    )
    next(tokens), next(tokens)
    return counted(lambda: next(tokens))


def a_step(config: TrainConfig) -> Count:
    trainer = step.Trainer(GPT(config.gpt_config(256)), config)
    batch = np.zeros((2, config.batch_size, config.block_size), np.int32)
    trainer.step([batch] * config.accumulate)
    return counted(lambda: trainer.step([batch] * config.accumulate))


def a_batch(model: GPT) -> Count:
    scorer, batch = Scorer(model), np.zeros((8, model.config.block_size), np.int32)
    scorer.losses(batch, batch), scorer(batch, batch)
    return counted(lambda: scorer.losses(batch, batch))


class Said(dict[str, Count]):
    """Says each case as soon as it is counted."""

    def __setitem__(self, case: str, count: Count) -> None:
        super().__setitem__(case, count)
        print(f"{case}: {count[0]} kernels, {count[1]} bytes", file=sys.stderr, flush=True)


def count_all() -> dict[str, Count]:
    """Compile and count each case."""
    Device["NULL"].renderer.compiler = ForEach()
    step.need_type = lambda name: None  # which rightly sees that nothing is computed
    model, counts = GPT(SMALL), Said()
    for dtype in DTYPES:
        held = convert(GPT(SMALL), dtype)
        counts[f"a token, {dtype}"] = a_token(held, temperature=0)
    counts["an evaluated batch"] = a_batch(model)
    for name, value in FILTERS.items():
        counts[f"a token, {name}"] = a_token(model, **{name: value})
    counts["8 tokens, greedy"] = a_token(model, 8, temperature=0)
    counts["8 tokens, all filters"] = a_token(model, 8, **FILTERS)
    for name, changes in TRAINING.items():
        counts[f"a training step, {name}"] = a_step(replace(TRAIN, **changes))
    gpt2 = GPT(GPTConfig(), seed=None)
    counts["a token of GPT-2 124M, greedy"] = a_token(gpt2, temperature=0)
    counts["a token of GPT-2 124M, top_k"] = a_token(gpt2, top_k=40)
    return counts


def beyond(counts: dict[str, Count], allowed: dict[str, Count]) -> list[str]:
    """A line for each case that has grown beyond what is allowed, or is in one of both alone."""
    lines = [f"{case}: it is not counted any more" for case in allowed.keys() - counts.keys()]
    for case, count in counts.items():
        limits = zip(("kernels", "bytes"), count, allowed.get(case, (0, 0)), strict=True)
        for what, number, most in limits:
            if number > most:
                lines.append(f"{case}: {number} {what}, where {most} are allowed")
    return lines


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit(__doc__)
    counts = count_all()
    table = json.dumps(counts, indent=1).replace("\n  ", " ").replace("\n ]", " ]")
    print(table)
    if sys.argv[1:]:
        TABLE.write_text(table + "\n", encoding="utf-8")
    elif grown := beyond(counts, json.loads(TABLE.read_text(encoding="utf-8"))):
        advice = "if that is meant, `python benchmarks/gpu_kernels.py --write` makes the table anew"
        sys.exit("\n".join([*grown, advice]))
