"""How fast this machine generates, as a share of what it can do, and beside other programs.

All programs read the same weights with the same number of threads. They take turns, so that other
work on the machine disturbs all of them alike. Numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from typing import Any

import numpy as np

import tinygpt
from tinygpt.checkpoints import hub
from tinygpt.checkpoints.open_checkpoint import Checkpoint, open_checkpoint
from tinygpt.checkpoints.quantization import DTYPES, check_dtype
from tinygpt.checkpoints.save_gguf import GGUF_TYPES
from tinygpt.commands.bench_tables import tables
from tinygpt.commands.flags import add_flag, add_shared
from tinygpt.commands.peers import Contender, environment
from tinygpt.config import GPTConfig
from tinygpt.errors import InputError, one_line, say
from tinygpt.model import GPT
from tinygpt.runtime import device

_PACKAGES = ("tinygrad", "numpy", "torch", "transformers", "llama-cpp-python")
_STREAM_BYTES, _BLOCK_BYTES = 1 << 30, 4 << 20  # far more than any cache holds
_MATMUL_SIZES = (1024, 1536, 2048)
_PROMPT = "The most important thing about a machine is"


@dataclass(frozen=True)
class Work:
    """What is timed: reading a prompt, or where `count` is more than 1, each token after it."""

    name: str
    batch_size: int
    prompt_length: int
    count: int  # how many tokens to choose


WORKS = (
    Work("decode", 1, 16, 49),
    Work("decode of 8", 8, 16, 33),
    *(Work(f"prefill of {length}", 1, length, 1) for length in (64, 512, 1000)),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    words = "which to run (default: gpt2 with random weights)"
    add_flag(parser, "--model", metavar="NAME|PATH", help=words)
    types = f"{', '.join(DTYPES)} (default: {', '.join(GGUF_TYPES)})"
    add_shared(parser, "--dtype", help=f"of its weights: {types}")
    words = "also stock tinygrad, transformers and llama.cpp"
    add_flag(parser, "--peers", kind=bool, help=words)
    words = "how many turns each takes (default: 5)"
    add_flag(parser, "--rounds", kind=int, default=5, help=words, low=1)
    add_shared(parser, "--json", help="print only the line of JSON, not the tables")


def run(args: argparse.Namespace) -> int:
    """Measure and print. The exit status is 1 when tinygpt itself failed at something."""
    device.check()
    if args.dtype:
        check_dtype(args.dtype)
    families = [("tinygpt", t) for t in ([args.dtype] if args.dtype else GGUF_TYPES)]
    if args.peers:
        families += [("stock tinygrad", "float32"), ("transformers", "float32")]
        families += [("llama.cpp", dtype) for dtype in GGUF_TYPES]
    with tempfile.TemporaryDirectory(prefix="tinygpt-bench-") as temporary:
        if args.model:
            folder = hub.resolve(args.model)
        else:
            say("making GPT-2 124M of random weights")
            folder = Path(temporary, "gpt2")
            GPT(GPTConfig.preset("gpt2"), seed=0).save_pretrained(folder)
        result = measure(folder, families, args.rounds)
    result["conditions"]["model"] = args.model or "gpt2, random weights"
    if not args.json:
        print(tables(result))
    print(json.dumps(result))
    return int(any(name.startswith("tinygpt") for name in result["failures"]))


def measure(folder: Path, families: Sequence[tuple[str, str]], rounds: int) -> dict[str, Any]:
    """What the command prints as JSON: `families` are pairs of peers.FAMILIES and dtypes."""
    found, conditions = open_checkpoint(folder), _conditions(rounds)
    config = found.config
    works = [w for w in WORKS if w.prompt_length + w.count - 1 <= config.block_size]
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        contenders = [Contender(*family, folder, device.cpu_count()) for family in families]
        for contender in contenders:
            stack.callback(contender.close)
        replies, machine = take_turns(contenders, works, rounds, config.vocab_size, failures)
    results = {
        contender.name: summarize(contender, replies[contender.name], config, machine)
        for contender in contenders
        if contender.name not in failures
    }
    return {
        "conditions": conditions,
        "machine": machine,
        "first_token": _first_token(found, failures),
        "results": results,
        "ratios": compare(results),
        "failures": failures,
    }


def take_turns(
    contenders: Sequence[Contender],
    works: Sequence[Work],
    rounds: int,
    vocab_size: int,
    failures: dict[str, str],
) -> tuple[dict[str, dict[Work, list[dict]]], dict[str, float]]:
    """Let each contender do each work in turn: once to warm up, then once a round.

    Args:
        failures: a contender that fails is put here with the reason, and is not asked again.
    Returns:
        the replies, by name and work, and what the machine reached between the rounds.
    """
    replies = {contender.name: {work: [] for work in works} for contender in contenders}
    limits: list[dict[str, float]] = []
    rng = np.random.default_rng(0)
    for number in range(rounds + 1):
        for work in works:
            prompts = rng.integers(vocab_size, size=(work.batch_size, work.prompt_length)).tolist()
            say(f"round {number} of {rounds}: {work.name}" if number else f"warm-up: {work.name}")
            for contender in contenders:
                if contender.name in failures:
                    continue
                try:
                    reply = contender.ask(prompts, work.count)
                    replies[contender.name][work] += [reply] if number else []
                except Exception as error:  # other packages may raise anything
                    reason = one_line(" ".join(str(error).split()))
                    if "No module named" in reason:
                        reason += "; pip install 'tinygpt[bench]' brings it"
                    failures[contender.name] = reason
                    say(f"{contender.name} fails: {reason}")
        limits.append(machine_limits())
    return replies, {name: median(limit[name] for limit in limits) for name in limits[0]}


def machine_limits() -> dict[str, float]:
    """What this machine reaches now in reading a large array and in a matmul: the best of a few."""
    rates, flops = [], []
    # Each block is multiplied with a vector, eight long rows at once, because reading from several
    # places of memory in turn is faster than reading from one.
    blocks = np.ones((_STREAM_BYTES // _BLOCK_BYTES, 8, _BLOCK_BYTES // 32), np.float32)
    parts = np.array_split(blocks, device.cpu_count())
    with ThreadPoolExecutor(device.cpu_count()) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda part: [np.dot(block, blocks[0, 0]) for block in part], parts))
            rates.append(_STREAM_BYTES / (time.perf_counter() - start))
    for size in _MATMUL_SIZES * 3:
        square = np.ones((size, size), np.float32)
        start = time.perf_counter()
        np.matmul(square, square)
        flops.append(2 * size**3 / (time.perf_counter() - start))
    return {"gb_per_s": max(rates) / 1e9, "gflop_per_s": max(flops) / 1e9}


def summarize(
    contender: Contender,
    replies: dict[Work, list[dict]],
    config: GPTConfig,
    machine: dict[str, float],
) -> dict[str, Any]:
    """A contender's medians, peak memory, and rates as shares of the machine's.

    GB/s count the weights that a step of `decode` reads; GFLOP/s are those of its best prefill.
    """
    works, rates = {}, dict.fromkeys(machine, 0.0)
    weight_bytes = DTYPES[contender.dtype].itemsize
    if contender.name == "llama.cpp int8":
        weight_bytes = 34 / 32  # Q8_0 adds a float16 scale to each 32 weights
    for work, answers in replies.items():
        if work.count == 1:
            times, tokens = [reply["first_s"] for reply in answers], work.prompt_length
            rate = prefill_flops(config, tokens) / median(times) / 1e9
            rates["gflop_per_s"] = max(rate, rates["gflop_per_s"])
        else:
            times, tokens = [reply["rest_s"] / (work.count - 1) for reply in answers], 1
            if work.batch_size == 1:
                rates["gb_per_s"] = weight_bytes * weights_read(config) / median(times) / 1e9
        tokens_per_s = work.batch_size * tokens / (middle := median(times))
        works[work.name] = {"median_s": middle, "tokens_per_s": tokens_per_s, "rounds_s": times}
    peaks = [reply["peak_memory_bytes"] or 0 for answers in replies.values() for reply in answers]
    shares = {f"{name}_share": rate / machine[name] for name, rate in rates.items()}
    return {"works": works, "peak_memory_bytes": max(peaks, default=0), **rates, **shares}


def weights_read(config: GPTConfig) -> int:
    """How many weights are read for the next token.

    That is all of them, less the tables of which only a row is looked up.
    """
    rows = config.block_size if config.position == "learned" else 0
    if not config.tie_word_embeddings:
        rows += config.vocab_size
    return config.parameter_count - rows * config.n_embd


def prefill_flops(config: GPTConfig, length: int) -> int:
    """How many multiplications and additions lead from a prompt to the next token's logits.

    In the last block that is the keys and values of all tokens, and the rest for the last one.
    """
    C, last = config.n_embd, config.n_layer - 1
    keys_and_values, rest = 2 * 2 * C * C, 2 * (2 * C * C + 2 * C * config.inner_dim)
    scores = 2 * length * C  # two products, of which the mask leaves half
    blocks = length * (config.n_layer * keys_and_values + last * (rest + scores))
    return blocks + rest + 2 * scores + 2 * C * config.vocab_size


def compare(results: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast as each peer tinygpt is: ours -> peer -> work -> ratio of medians.

    A peer is compared in the same type of weights, or in float32 where it does not have that type.
    """
    families = dict.fromkeys(name.rpartition(" ")[0] for name in results)
    ratios: dict[str, dict] = {}
    for name in (name for name in results if name.startswith("tinygpt ")):
        ours, ratios[name] = results[name]["works"], {}
        for family in (family for family in families if family != "tinygpt"):
            same = name.replace("tinygpt", family)
            peer = same if same in results else f"{family} float32"
            if peer in results:
                theirs = results[peer]["works"]
                ratios[name][peer] = {w: theirs[w]["median_s"] / ours[w]["median_s"] for w in ours}
    return ratios


def _first_token(found: Checkpoint, failures: dict[str, str]) -> dict[str, float]:
    """Seconds from starting the program to its first new text.

    Cold is with no compiled kernels kept; warm is with those, and the median of three.
    """
    command = [sys.executable, "-m", "tinygpt", "generate", _PROMPT, "--model", str(found.path)]
    command += ["--max-new-tokens", "1"]
    try:
        found.tokenizer()
    except InputError:  # it is GPT-2's, and there is no network to fetch it with
        command += ["--tokenizer", "bytes"]
    times: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    with tempfile.TemporaryDirectory(prefix="tinygpt-bench-") as empty:
        settings = {**environment(), "CACHEDB": str(Path(empty, "kernels.db"))}
        for name in ("cold_s", *["warm_s"] * 3):
            say(f"first token, {name.removesuffix('_s')}")
            start = time.perf_counter()
            with Popen(command, env=settings, stdout=PIPE, stderr=PIPE) as process:
                process.stdout.read(len(_PROMPT) + 1)  # the program shows the prompt first
                times[name].append(time.perf_counter() - start)
                _, errors = process.communicate()
            if process.returncode:
                failures["tinygpt first token"] = one_line(errors.decode(errors="replace").strip())
                return {}
    return {name: median(seconds) for name, seconds in times.items()}


def _conditions(rounds: int) -> dict[str, Any]:
    packages = {"python": platform.python_version(), "tinygpt": tinygpt.__version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(x for x in lines if x.startswith("model name")).partition(": ")[2]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "threads": device.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device.describe(),
        "system": f"{platform.system()} {platform.release()}",
        "packages": packages,
        "rounds": rounds,
    }
