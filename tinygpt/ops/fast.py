"""The operations in C, for the CPU where clang compiles for it: each as in `plain`, with gradients.

README.md beside this file says which C function is which operation, and which test holds the two
equal. Arguments are those of the functions in `ops`, which choose between the two forms.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from tinygrad import Tensor, dtypes

from tinygpt.ops.plain import Dropout, Heads
from tinygpt.ops.sizes import Position, Whole, shape
from tinygpt.runtime import device, launch
from tinygpt.runtime.launch import Gradient, Tensors

# A thread is worth its while for so many floating-point operations: meeting it costs about a
# microsecond.
_THREAD_FLOPS = 50_000
# Up to so many rows a product with weights is gemv.h's, whose time is that of reading them.
_FEW_ROWS = 16
# Up to so many queries attention has a way of its own: see attention.c.
_FEW_QUERIES = 8
# Of attention: see attention.c.
_STRIP, _BAND = 66, 96

# What is passed to C: None is a null pointer.
Given = dict[str, Tensor | None]


def usable(*tensors: Tensor | None) -> bool:
    """Whether the C forms hold for tensors: on one CPU, with clang, and not turned off."""
    present = [tensor for tensor in tensors if tensor is not None]
    names = {tensor.device for tensor in present}
    if len(names) != 1 or not device.takes_c(str(next(iter(names)))):
        return False
    return all(isinstance(size, int) for tensor in present for size in tensor.shape)


def count_threads(flops: int, most: int | None = None) -> int:
    """How many threads work of that size is worth, and at most so many."""
    threads = max(1, min(device.cpu_count(), flops // _THREAD_FLOPS))
    return threads if most is None else max(1, min(threads, most))


_HERE = Path(__file__).parent


def _empty(like: Tensor, *sizes: int) -> Tensor:
    """Memory for float32 numbers, beside those of another tensor."""
    return Tensor.empty(*sizes, device=like.device)


def _rows(x: Tensor) -> int:
    return math.prod(shape(x)[:-1])


def matmul(a: Tensor, b: Tensor, a_transposed: bool, b_transposed: bool) -> Tensor:
    *leading, M, K = shape(a.transpose(-2, -1) if a_transposed else a)
    N, batch = shape(b)[-2 if b_transposed else -1], math.prod(leading)
    flops = 2 * batch * M * N * K

    def gradient(d: Tensor, at: Tensors) -> Tensors:
        a, b = at["a"], at["b"]
        if a_transposed:
            da = matmul(b, d, b_transposed, True)
        else:
            da = matmul(d, b, False, not b_transposed)
        if b_transposed:
            db = matmul(d, a, True, a_transposed)
        else:
            db = matmul(a, d, not a_transposed, False)
        return {"a": da, "b": db}

    return launch.call(
        _HERE / "matmul.c", "matmul",
        {"c": _empty(a, *leading, M, N), "a": a, "b": b},
        {"batch": batch, "M": M, "N": N, "K": K, "a_transposed": int(a_transposed),
         "b_transposed": int(b_transposed)},
        count_threads(flops), flops, gradient=gradient if b.dtype == dtypes.float32 else None,
    )["c"]  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    (N, K), M = shape(weight), _rows(x)
    flops = 2 * M * N * K

    def gradient(dy: Tensor, at: Tensors) -> Tensors:
        found = _linear_backward(dy, at["x"], at["weight"], bias is not None)
        if residual is not None:
            found["residual"] = dy
        return found

    return launch.call(
        _HERE / "linear.c", "linear",
        {"y": _empty(x, *shape(x)[:-1], N), "x": x, "weight": weight,
         "scale": scale, "bias": bias, "residual": residual},
        {"few": M if M <= _FEW_ROWS else 0, "M": M, "N": N, "K": K},
        count_threads(flops), flops, fixed=("few", "K") if M <= _FEW_ROWS else ("few",),
        gradient=gradient if weight.dtype == dtypes.float32 and scale is None else None,
    )["y"]  # fmt: skip


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: bool) -> dict[str, Tensor]:
    (N, K), M = shape(weight), _rows(x)
    flops = 4 * M * N * K
    found = launch.call(
        _HERE / "linear.c", "linear_backward",
        {"dx": _empty(x, *shape(x)), "dweight": _empty(x, N, K),
         "dbias": _empty(x, N) if bias else None,
         "dy": dy, "x": x, "weight": weight},
        {"M": M, "N": N, "K": K}, count_threads(flops), flops, launch.WEIGHTS[dtypes.float32],
    )  # fmt: skip
    return {name.removeprefix("d"): tensor for name, tensor in found.items()}


def activation(x: Tensor, kind: str) -> Tensor:
    macros, n = {"ACTIVATION": kind}, math.prod(shape(x))
    threads = count_threads(20 * n)

    def gradient(dy: Tensor, at: Tensors) -> Tensors:
        tensors = {"dx": _empty(x, *shape(x)), "dy": dy, "x": at["x"]}
        return {"x": launch.call(_HERE / "activation.c", "activation_backward", tensors, {"n": n},
                                 threads, 20 * n, macros)["dx"]}  # fmt: skip

    tensors = {"y": _empty(x, *shape(x)), "x": x}
    return launch.call(_HERE / "activation.c", "activation", tensors, {"n": n}, threads, 20 * n,
                       macros, gradient=gradient)["y"]  # fmt: skip


def embedding(ids: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    (V, C), count = shape(table), math.prod(shape(ids))
    sizes = {"count": count, "V": V, "C": C}

    def gradient(dy: Tensor, at: Tensors) -> Tensors:
        tensors = {"dtable": _empty(ids, V, C), "dy": dy, "ids": at["ids"]}
        flops = V * C + count * C
        threads = count_threads(flops, max(1, C // 16))
        return {"table": launch.call(_HERE / "embedding.c", "embedding_backward", tensors, sizes,
                                     threads, flops,
                                     launch.WEIGHTS[dtypes.float32])["dtable"]}  # fmt: skip

    y = _empty(ids, *shape(ids), C)
    return launch.call(
        _HERE / "embedding.c", "embedding", {"y": y, "ids": ids, "table": table, "scale": scale},
        sizes, count_threads(count * C, count), count * C,
        gradient=gradient if table.dtype == dtypes.float32 else None,
    )["y"]  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    R, C = _rows(x), shape(x)[-1]
    numbers = {"R": R, "C": C, "epsilon": float(epsilon)}
    flops = 10 * R * C
    threads = count_threads(flops, R)

    def gradient(dy: Tensor, at: Tensors) -> Tensors:
        tensors = {"dx": _empty(x, *shape(x)), "parts": _empty(x, threads, 2, C), "dy": dy}
        tensors |= {"x": at["x"], "weight": at["weight"]}
        file = _HERE / "layer_norm.c"
        found = launch.call(file, "layer_norm_backward", tensors, numbers, threads, 2 * flops)
        sums = found["parts"].sum(0)
        grads = {"x": found["dx"], "weight": sums[0]}
        return grads if bias is None else grads | {"bias": sums[1]}

    tensors = {"y": _empty(x, *shape(x)), "x": x, "weight": weight, "bias": bias}
    return launch.call(_HERE / "layer_norm.c", "layer_norm", tensors, numbers, threads, flops,
                       gradient=gradient)["y"]  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    dropout: Dropout | None,
) -> Tensor:
    B, T, C = shape(q)
    flops = 2 * B * T * T * C
    threads = count_threads(flops, B * heads.n_head)
    numbers = {"B": B, "T": T, "D": C // heads.n_head, **asdict(heads)}
    numbers |= _dropout_numbers(dropout, "dropout_scale")
    key = None if dropout is None else dropout.key

    def gradient(dy: Tensor, at: Tensors) -> Tensors:
        tensors: Given = {name: _empty(q, B, T, C) for name in ("dq", "dk", "dv")}
        tensors |= {"scratch": _empty(q, threads, 2, T, T), "dy": dy}
        tensors |= {name: at[name] for name in ("probs", "q", "k", "v")} | {"key": at.get("key")}
        found = launch.call(_HERE / "attention.c", "attention_backward", tensors, numbers, threads,
                            2 * flops)  # fmt: skip
        return {name: found[f"d{name}"] for name in ("q", "k", "v")}

    scratch = _empty(q, threads, 1 if key is None else _STRIP, T)
    tensors: Given = {"y": _empty(q, B, T, C), "probs": _empty(q, B, heads.n_head, T, T)}
    tensors |= {"scratch": scratch, "q": q, "k": k, "v": v, "key": key}
    return launch.call(_HERE / "attention.c", "attention", tensors, numbers, threads, flops,
                       gradient=gradient)["y"]  # fmt: skip


def attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    cache: tuple[Tensor, Tensor],
    start_pos: Position,
    slots: Tensor | None,
    row: Whole | None,
) -> Tensor:
    (B, M, C), T, S = shape(q), shape(k)[1], shape(cache[0])[2]
    flops = 2 * B * M * S * C
    threads = count_threads(flops, B * heads.n_head)
    starts = start_pos if isinstance(start_pos, Tensor) else None
    few = M <= _FEW_QUERIES
    scores = _empty(q, threads, 1 if few else min(M, _BAND), S)
    tensors: Given = {"y": _empty(q, B, M, C), "keys": cache[0], "values": cache[1]}
    tensors |= {"scores": scores, "q": q, "k": k, "v": v, "starts": starts, "slots": slots}
    numbers: dict[str, float | Whole] = {
        "start_pos": 0 if isinstance(start_pos, Tensor) else start_pos,
        "B": B, "T": T, "S": S, "D": C // heads.n_head, **asdict(heads),
    }  # fmt: skip
    if few:
        numbers |= {"M": M, "row": 0 if row is None else row}
    return launch.call(
        _HERE / "attention.c", "attention_few" if few else "attention_cached", tensors, numbers,
        threads, flops, fixed=("D",) if few else (),
    )["y"]  # fmt: skip


def _dropout_numbers(dropout: Dropout | None, scale: str = "scale") -> dict[str, int | float]:
    """The numbers that C takes for a dropout; without one they are not read."""
    if dropout is None:
        return {"place": 0, "threshold": 0, scale: 1.0}
    return {"place": dropout.place, "threshold": dropout.threshold, scale: dropout.scale}


def dropout(x: Tensor, dropout: Dropout, residual: Tensor | None) -> Tensor:
    n, row_size = math.prod(shape(x)), math.prod(shape(x)[1:])
    numbers = {"n": n, "row_size": row_size, **_dropout_numbers(dropout)}
    threads = count_threads(20 * n)

    def drop(
        x: Tensor, key: Tensor, residual: Tensor | None, gradient: Gradient | None = None
    ) -> Tensor:
        tensors = {"y": _empty(x, *shape(x)), "x": x, "residual": residual, "key": key}
        return launch.call(_HERE / "dropout.c", "dropout", tensors, numbers, threads, 20 * n,
                           gradient=gradient)["y"]  # fmt: skip

    def gradient(dy: Tensor, at: Tensors) -> Tensors:
        grads = {"x": drop(dy, at["key"], None)}
        return grads if residual is None else grads | {"residual": dy}

    return drop(x, dropout.key, residual, gradient)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    (V, C), R = shape(weight), _rows(x)
    flops = 2 * R * V * C

    def gradient(d: Tensor, at: Tensors) -> Tensors:
        # At the logits the gradient is d * errors: d scales rows, and so may as well scale those
        # of x, or of the result, which are shorter.
        d, x = d.unsqueeze(-1), at["x"]
        found = _linear_backward(at["errors"], (x * d).contiguous(), at["weight"], bias=False)
        return {"x": found["x"] * d, "weight": found["weight"]}

    tensors: Given = {"losses": _empty(x, *shape(x)[:-1]), "errors": _empty(x, *shape(x)[:-1], V)}
    tensors |= {"x": x, "weight": weight, "scale": scale, "targets": targets}
    return launch.call(
        _HERE / "cross_entropy.c", "cross_entropy", tensors, {"R": R, "C": C, "V": V},
        count_threads(flops, R), flops,
        gradient=gradient if weight.dtype == dtypes.float32 and scale is None else None,
    )["losses"]  # fmt: skip


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    sizes = [math.prod(shape(tensor)) for tensor in tensors]
    most = max(count_threads(2 * n) for n in sizes)
    totals = Tensor.zeros(most, device=tensors[0].device).contiguous()
    for tensor, n in zip(tensors, sizes, strict=True):
        totals = launch.call(_HERE / "adamw.c", "sum_of_squares", {"totals": totals, "x": tensor},
                             {"n": n}, count_threads(2 * n), 2 * n)["totals"]  # fmt: skip
    return totals.sum()


def adamw(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    inputs: Tensor,
    decay: float,
    betas: tuple[float, float],
) -> None:
    n = math.prod(shape(parameter))
    written = {"parameter": parameter, "mean": mean, "square": square}
    tensors = {**written, "gradient": gradient, "inputs": inputs}
    numbers = {"n": n, "decay": float(decay)}
    for i, beta in enumerate(map(float, betas), 1):
        numbers |= {f"beta{i}": beta, f"rest{i}": 1 - beta}
    found = launch.call(_HERE / "adamw.c", "adamw", tensors, numbers, count_threads(16 * n), 16 * n)
    for name, tensor in written.items():
        tensor.replace(found[name])  # so that what reads it now waits for this


def threshold(order: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    B, V = shape(order)
    tensors = {
        "found": Tensor.empty(B, 1, dtype=dtypes.uint32, device=order.device),
        "order": order, "weights": weights.float(),
        "target": target.float().expand(B, 1).contiguous(),
    }  # fmt: skip
    flops = 64 * B * V
    return launch.call(_HERE / "sampling.c", "threshold", tensors, {"B": B, "V": V},
                       count_threads(flops, B), flops)["found"]  # fmt: skip


def gumbel(seeds: Tensor, draw: Tensor, size: int) -> Tensor:
    B = shape(seeds)[0]
    tensors = {"noise": _empty(seeds, B, size), "seeds": seeds, "draws": draw}
    flops = 16 * B * size
    return launch.call(_HERE / "sampling.c", "gumbel", tensors, {"B": B, "V": size},
                       count_threads(flops), flops)["noise"]  # fmt: skip
