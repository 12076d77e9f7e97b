"""The matrix product and its two gradients over GPT-2's shapes, beside torch, taking turns.

Run as `python benchmarks/matmul.py [ROUNDS]` with DEV=CPU, clang and torch. Each program has
a process of its own, as torch's threads, and what its import brings, slow down another's launches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.helpers import CPU_COUNT

from tinygpt.ops import matmul

GFLOP = (
    4  # so much in a row, as a step of training has many times that: a call of TinyJit takes 0.5 ms
)
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
    """Of the second call: before the first the other program's threads spin for a while."""
    time.sleep(0.03)
    for _ in range(2):
        start = time.perf_counter()
        function()
    return time.perf_counter() - start


def draw(shapes: list[tuple[int, int]], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for _ in range(count) for shape in shapes]


def ours(shape: tuple[int, int, int], name: str, count: int) -> Callable[[], list[np.ndarray]]:
    """A function that does so many products."""
    product, _, *shapes = products(*shape)[name]
    tensors = [Tensor(array).realize() for array in draw(shapes, count)]

    # It captures the tensors: TinyJit takes 0.1 ms for each that it is given.
    @TinyJit
    def run() -> list[Tensor]:
        made = [product(a, b) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        Tensor.realize(*made)
        return made

    def call() -> list[Tensor]:
        made = run()
        Device["CPU"].synchronize()
        return made

    return call


class Theirs:
    """The same in torch; its methods are called in a process of their own."""

    run: Callable[[], list]

    @classmethod
    def prepare(cls, shape: tuple[int, int, int], name: str, count: int, threads: int) -> object:
        """The first product."""
        import torch

        torch.set_num_threads(threads)
        _, product, *shapes = products(*shape)[name]
        tensors = [torch.from_numpy(array) for array in draw(shapes, count)]
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        cls.run = lambda: [product(a, b) for a, b in pairs]
        return cls.run()[0].numpy()

    @classmethod
    def time_s(cls) -> float:
        return time_s(cls.run)


def compare(shape: tuple[int, int, int], name: str, rounds: int, other: Executor) -> float:
    """Print both speeds and their ratio, for as many such products in a row as make GFLOP."""
    flops = 2 * np.prod(shape) / 1e9
    count = max(1, round(GFLOP / flops))
    run = ours(shape, name, count)
    expected = other.submit(Theirs.prepare, shape, name, count, CPU_COUNT.value).result()
    for _ in range(3):
        made = run()
    assert np.allclose(made[0].numpy(), expected, atol=1e-2), (shape, name)
    times = [(time_s(run), other.submit(Theirs.time_s).result()) for _ in range(rounds)]
    ours_s, theirs_s = (median(column) / count for column in zip(*times, strict=True))
    speeds = f"{flops / ours_s:6.0f} {flops / theirs_s:6.0f} GFLOP/s"
    print(f"{shape!s:>18} {name:8} x {count:<2} {speeds} {theirs_s / ours_s:.2f}", flush=True)
    return theirs_s / ours_s


def main(rounds: int) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        ratios = [
            compare(shape, name, rounds, other) for shape in SHAPES for name in products(1, 1, 1)
        ]
    print(f"median {median(ratios):.2f}, worst {min(ratios):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
