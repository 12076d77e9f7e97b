"""The matrix product and its two gradients over GPT-2's shapes, beside torch, taking turns.

Run as `python tests/benchmarks/matmul.py [ROUNDS]` with DEV=CPU, clang and torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from tinygrad import Device, Tensor, TinyJit
from tinygrad.helpers import CPU_COUNT

from tinygpt.kernels import matmul

# rows, in, out of linear layers: GPT-2 124M's, its head, and those of a 384 wide model
SHAPES = [
    (64, 768, 768), (64, 768, 3072), (64, 3072, 768), (64, 768, 50257),
    (512, 768, 768), (512, 768, 3072), (512, 3072, 768),
    (2048, 384, 384), (2048, 384, 1536), (2048, 1536, 384), (768, 128, 512),
]  # fmt: skip


def products(rows: int, inner: int, out: int) -> dict[str, tuple]:
    """x @ w.T, and the gradients of x and w: name -> (our function, theirs, shapes of both)."""
    x, w, d = (rows, inner), (out, inner), (rows, out)
    return {
        "x @ w.T": (lambda a, b: matmul(a, b, False, True), lambda a, b: a @ b.T, x, w),
        "d @ w": (lambda a, b: matmul(a, b), lambda a, b: a @ b, d, w),
        "d.T @ x": (lambda a, b: matmul(a, b, True), lambda a, b: a.T @ b, d, x),
    }


def time_s(function: Callable[[], object]) -> float:
    """Of the second call: in the first one the threads of the other program still hold the cores,
    as torch's go on spinning for a while."""
    time.sleep(0.03)
    for _ in range(2):
        start = time.perf_counter()
        function()
    return time.perf_counter() - start


def compare(shape: tuple[int, int, int], name: str, rounds: int) -> float:
    """Print both speeds and their ratio, for as many such products in a row as make a gigaflop."""
    ours, theirs, *shapes = products(*shape)[name]
    flops, rng = 2 * np.prod(shape) / 1e9, np.random.default_rng(0)
    count = max(1, round(1 / flops))
    pairs = [[rng.standard_normal(s, np.float32) for s in shapes] for _ in range(count)]
    tensors = [Tensor(array).realize() for pair in pairs for array in pair]
    peers = [[torch.from_numpy(array) for array in pair] for pair in pairs]

    # It captures the tensors: TinyJit takes 0.1 ms for each that it is given.
    @TinyJit
    def run() -> list[Tensor]:
        made = [ours(a, b) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        Tensor.realize(*made)
        return made

    def us() -> None:
        run()
        Device["CPU"].synchronize()

    def them() -> list[torch.Tensor]:
        return [theirs(a, b) for a, b in peers]

    for _ in range(3):
        made = run()
    for mine, other in zip(made, them(), strict=True):
        assert np.allclose(mine.numpy(), other.numpy(), atol=1e-2), (shape, name)
    times = [(time_s(us), time_s(them)) for _ in range(rounds)]
    ours_s, theirs_s = (median(column) / count for column in zip(*times, strict=True))
    speeds = f"{flops / ours_s:6.0f} {flops / theirs_s:6.0f} GFLOP/s"
    print(f"{shape!s:>18} {name:8} x {count:<2} {speeds} {theirs_s / ours_s:.2f}", flush=True)
    return theirs_s / ours_s


def main(rounds: int) -> None:
    torch.set_num_threads(CPU_COUNT.value)
    ratios = [compare(shape, name, rounds) for shape in SHAPES for name in products(1, 1, 1)]
    print(f"median {median(ratios):.2f}, worst {min(ratios):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
