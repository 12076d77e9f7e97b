"""The matrix product and its two gradients over GPT-2's shapes, beside torch, taking turns.

Run as `python tests/benchmarks/matmul.py [ROUNDS]` with DEV=CPU, clang and torch.
"""

from __future__ import annotations

import sys
import time
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
    """x @ w.T, and the gradients of x and w: name -> (our function, theirs, two arrays)."""
    rng = np.random.default_rng(0)
    x, w, d = (
        rng.standard_normal(shape, np.float32)
        for shape in ((rows, inner), (out, inner), (rows, out))
    )
    return {
        "x @ w.T": (lambda a, b: matmul(a, b, False, True), lambda a, b: a @ b.T, x, w),
        "d @ w": (lambda a, b: matmul(a, b), lambda a, b: a @ b, d, w),
        "d.T @ x": (lambda a, b: matmul(a, b, True), lambda a, b: a.T @ b, d, x),
    }


def main(rounds: int) -> None:
    """Print a line for each product: both speeds, and how many times as fast ours is."""
    torch.set_num_threads(CPU_COUNT.value)
    ratios = []
    for shape in SHAPES:
        for name, (ours, theirs, a, b) in products(*shape).items():
            jit = TinyJit(lambda a, b, ours=ours: ours(a, b).realize())
            tensors, peers = (
                [Tensor(m).realize() for m in (a, b)],
                [torch.tensor(m) for m in (a, b)],
            )
            result = [jit(*tensors).numpy() for _ in range(3)][-1]
            assert np.allclose(result, theirs(*peers).numpy(), atol=1e-2), (shape, name)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                time.sleep(0.03)  # torch's threads spin for a while, on the cores that ours need
                start = time.perf_counter()
                jit(*tensors)
                Device["CPU"].synchronize()
                times[0].append(time.perf_counter() - start)
                theirs(*peers)  # awake again
                start = time.perf_counter()
                theirs(*peers)
                times[1].append(time.perf_counter() - start)
            us, them = map(median, times)
            flops, ratio = 2 * np.prod(shape) / 1e9, them / us
            ratios.append(ratio)
            print(
                f"{shape!s:>18} {name:8} {flops / us:6.0f} {flops / them:6.0f} GFLOP/s {ratio:.2f}"
            )
    print(f"median {median(ratios):.2f}, worst {min(ratios):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
