"""What it costs to train in several processes: under mpirun, and its model of time.

    mpirun -n 2 --bind-to none python benchmarks/ranks.py step      a step of all ranks beside one
                          of a single rank with its part of the batch, both with one thread a rank
    mpirun -n 2 --bind-to none python benchmarks/ranks.py reduce    sums of gradients, by their size
    python benchmarks/ranks.py predict FILE     what `reduce` printed -> a fit on its smallest and
                                                largest, and how far off the others are

Prints a JSON object a line. Gradients are those of GPT-2 124M unless `--preset` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from tinygpt.runtime import device
from tinygpt.training.world import variable

PART_BYTES = 25_000_000


def step(args: argparse.Namespace) -> None:
    """Steps in turns: of all ranks, and of rank 0 alone with its part of the batch."""
    from tinygpt import GPT
    from tinygpt.config import PRESETS, GPTConfig
    from tinygpt.training.ranks import Alone, Ranks
    from tinygpt.training.settings import SHAPE, TrainConfig
    from tinygpt.training.step import Trainer
    from tinygpt.training.world import World

    device.use_threads(1)
    world = World()
    config = GPTConfig(**PRESETS[args.preset])
    shape = {name: getattr(config, name) for name in SHAPE} | {"block_size": args.block}
    whole = TrainConfig.of(shape, {"batch_size": args.batch, "sample_tokens": 0})
    model = GPT(replace(config, block_size=args.block), 0)
    together = Trainer(model, whole, Ranks(world, 600))
    alone = Trainer(model, replace(whole, batch_size=args.batch // world.size), Alone())
    draw, times = np.random.default_rng(0), {"together": [], "alone": []}

    def batch(rows: int):
        given = draw.integers(0, model.config.vocab_size, (2, rows, args.block))
        return [tuple(given.astype(np.int32))]

    for _ in range(args.rounds + 1):
        for name, trainer, rows in (
            ("alone", alone, args.batch // world.size),
            ("together", together, args.batch),
        ):
            given = batch(rows)
            world.meet()
            begun = time.perf_counter()
            if name == "together" or world.rank == 0:
                trainer.step(given)
                times[name].append(time.perf_counter() - begun)
            world.meet()
    if world.rank == 0:
        found = {name: median(each[1:]) for name, each in times.items()}
        ratio = found["together"] / found["alone"]
        print(json.dumps({"ranks": world.size, "seconds": found, "ratio": round(ratio, 3)}))


def reduce(args: argparse.Namespace) -> None:
    """Sums over all ranks, of several sizes, in pieces as a run sends them."""
    from tinygpt.training.world import World

    world = World()
    for megabytes in (1, 5, 25, 50, 100, 250, 500):
        array, times = np.ones(megabytes * 250_000, np.float32), []
        for _ in range(args.rounds + 1):
            world.meet()
            begun = time.perf_counter()
            world.total(array, PART_BYTES)
            times.append(time.perf_counter() - begun)
        if world.rank == 0:
            found = {"ranks": world.size, "bytes": array.nbytes, "seconds": median(times[1:])}
            print(json.dumps(found))


def predict(args: argparse.Namespace) -> None:
    """Bandwidth and latency from two of the sizes, and what these say of the others."""
    lines = Path(args.file).read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines if line.startswith("{")]

    def terms(point: dict) -> tuple[float, float]:
        ranks, size = point["ranks"], point["bytes"]
        return 2 * (ranks - 1) / ranks * size, -(-size // PART_BYTES)

    ends = [points[0], points[-1]]
    solved = np.linalg.solve([terms(p) for p in ends], [p["seconds"] for p in ends])
    print(json.dumps({"bytes_per_s": 1 / solved[0], "latency_s": solved[1]}))
    for point in points:
        off = terms(point) @ solved / point["seconds"] - 1
        print(json.dumps({**point, "predicted_off": round(float(off), 3)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", "reduce", "predict"])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch", type=int, default=8, help="samples of a whole batch")
    parser.add_argument("--block", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.what != "predict" and variable("SIZE", 1) < 2:
        parser.error(f"{args.what} is of several processes: start it by mpirun -n 2")
    {"step": step, "reduce": reduce, "predict": predict}[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
