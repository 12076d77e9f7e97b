"""The forward pass of a GPT that generates, as one C kernel (reading.c); plain, it is in `model`.

One kernel, because starting one on two threads takes tinygrad 0.14 ms, and whatever Python does
between two of them it does with caches that the weights have just gone through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from tinygrad import Tensor, UOp, dtypes

from tinygpt.ops.fast import ACTIVATIONS, WEIGHTS, call, count_threads, fast, meeting_place

# So many blocks in one kernel at most: their pointers are the arguments of one C call.
_MOST_LAYERS = 16


def fast_reading(weights: Sequence[Tensor]) -> bool:
    """Whether `read_tokens` holds: as `fast`, and with all matrices of one dtype."""
    return fast(*weights) and len({w.dtype for w in weights if w.ndim == 2}) == 1


def read_tokens(
    tokens: Tensor,
    positions: Tensor,
    cache: Sequence[tuple[Tensor, Tensor]],
    start_pos: UOp,
    padding: Tensor | None,
    end: int | UOp | None,
    *,
    table: Mapping[str, Tensor],
    layers: Sequence[Mapping[str, Tensor]],
    final: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    scales: Sequence[float],
    epsilon: float,
    activation: str,
    pre_norm: bool,
    shortcut: bool,
) -> Tensor:
    """Tokens into the cache, and the logits of one of them; no gradients, no dropout.

    Args:
        tokens: int32 (B, T).
        positions: float32 (B or 1, T, C), what is added to the tokens' embeddings.
        cache: keys and values for each block, each (B, H, S, D), written at start_pos.
        start_pos: a bound Variable, whose value the graph of positions brings.
        padding: int32 (B,) or None.
        end: the column whose logits are wanted, a number or a bound Variable; None for none.
        table: weight and scale of the token embeddings, in the matrices' dtype.
        layers: each block's weights by their names there, the matrices of one dtype, the rest
            float32; a bias or scale may be absent.
        final: weight and bias of the final norm, as far as they are there.
        head: weight and scale of the output projection.
        scales: of each block's attention scores.
    Returns:
        float32 logits (B, V); without an end something that need only be realised.
    """
    B, T = tokens.shape
    macros = {
        "EPSILON": f"{epsilon!r}f", "ACTIVATION": ACTIVATIONS[activation],
        "PRE_NORM": int(pre_norm), "SHORTCUT": int(shortcut),
        "VOCABULARY": table["weight"].shape[0], "POSITION_ROWS": math.prod(positions.shape[:2]),
    }  # fmt: skip
    around = {"tokens": tokens, "positions": positions.contiguous(), **_named("table_", table)}
    for start in range(0, len(layers), _MOST_LAYERS):
        some = slice(start, start + _MOST_LAYERS)
        macros["LAST"] = int(some.stop >= len(layers))
        if macros["LAST"] and end is not None:
            column = None if T == 1 else (Tensor.zeros(1, dtype=dtypes.int32) + end).contiguous()
            logits = Tensor.empty(B, macros["VOCABULARY"])
            around |= {"logits": logits, "end": column}
            around |= {**_named("ln_f_", final), **_named("head_", head)}
        around["padding"] = padding
        x = _blocks((B, T), layers[some], cache[some], scales[some], start_pos, around, macros)
        around = {"x": x}
    return x


def _named(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in weights.items()}


def _blocks(
    shape: tuple[int, int],
    layers: Sequence[Mapping[str, Tensor]],
    cache: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    start_pos: UOp,
    around: Mapping[str, Tensor | None],
    macros: Mapping[str, object],
) -> Tensor:
    """Some blocks with what is before and after them: tokens or x, logits or nothing."""
    (B, T), (_, H, S, D) = shape, cache[0][0].shape
    inner = layers[0]["mlp.c_fc.weight"].shape[0]
    flops = 2 * B * T * sum(w.numel() for weights in layers for w in weights.values())
    threads = count_threads(flops)
    optional = ("x", "tokens", "positions", "padding", "end", "ln_f_weight", "ln_f_bias", "logits")
    buffers = {
        "out": Tensor.empty(B, T, H * D),
        "scratch": Tensor.empty(B * T * (6 * H * D + inner) + threads * T * S),
        "sync": meeting_place(),
        **dict.fromkeys(optional),
        **around,
    }
    written, rows = ["out", "scratch", "sync", "logits"], []
    for i, (weights, pair, scale) in enumerate(zip(layers, cache, scales, strict=True)):
        row = {f"l{i}_{name.replace('.', '_')}": weights.get(name) for name in _layer_names()}
        row |= {f"l{i}_keys": pair[0], f"l{i}_values": pair[1]}
        buffers |= {name: tensor for name, tensor in row.items() if tensor is not None}
        written += [f"l{i}_keys", f"l{i}_values"]
        names = ["0" if tensor is None else name for name, tensor in row.items()]
        rows.append(f"{{{', '.join(names)}, {float(scale)!r}f}}")
    for matrix in ("table", "head"):
        names = [f"{matrix}_{part}" for part in ("weight", "bias", "scale")]
        macros = {**macros, matrix.upper(): ", ".join(n if n in buffers else "0" for n in names)}
    macros = {
        **macros, "B": B, "T": T, "H": H, "D": D, "F": inner, "S": S,
        "LAYERS": ", ".join(rows), **WEIGHTS[layers[0]["mlp.c_fc.weight"].dtype],
    }  # fmt: skip
    place, sources = {"start_pos": start_pos.unbind()[0]}, ("kernels.c", "reading.c")
    made = call("read", buffers, written, macros, flops, place, sources=sources)
    return made[0] if buffers["logits"] is None else made[3]  # behind out, scratch and sync


@functools.cache
def _layer_names() -> tuple[str, ...]:
    """A block's weights, in the order of `struct layer` in reading.c."""
    linears = [f"attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.c_fc", "mlp.c_proj"]
    layers = [(name, ("weight", "bias")) for name in ("ln_1", "ln_2")]
    layers += [(name, ("weight", "bias", "scale")) for name in linears]
    return tuple(f"{layer}.{part}" for layer, parts in layers for part in parts)
