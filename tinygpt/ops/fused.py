"""Training's fast CPU forms: losses with their gradients, and AdamW, in a few large kernels.

A step of a small model in plain tensors is hundreds of small kernels, whose starts cost as much as
their work. Here a block is one kernel forward and one backward, as are the embeddings and the head
with the loss; all parameters are updated by one. They are C, in training.c, on top of kernels.c,
and hold where `usable` says so; everywhere else the plain forms do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tinygrad import Tensor, UOp, dtypes
from tinygrad.nn.state import get_state_dict

from tinygpt.config import GPTConfig
from tinygpt.layers import TransformerBlock
from tinygpt.model import GPT
from tinygpt.ops.fast import ACTIVATIONS, call, count_threads, fast, meeting_place


def usable(model: GPT) -> bool:
    """Whether the C forms can compute this model, now: dropout is a matter of training alone."""
    config, weights = model.config, get_state_dict(model).values()
    dropout = config.embd_pdrop or config.attn_pdrop or config.resid_pdrop
    return (
        not (dropout and Tensor.training)
        and config.n_embd % 8 == config.inner_dim % 8 == 0
        and all(weight.dtype == dtypes.float32 for weight in weights)
        and fast(*weights)
    )


def token_losses(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each token in nats: the model's forward pass and loss.

    Args:
        tokens, targets: int32 (B, T).
    Returns:
        float32 (B, T), through which gradients go.
    """
    if not usable(model):
        return cross_entropy(model(tokens), targets)
    learned = model.config.position == "learned"
    x = _embed(tokens, model.wte.weight, model.wpe.weight if learned else None)
    if not learned:
        places = Tensor.arange(tokens.shape[1], dtype=dtypes.int32).reshape(1, -1)
        x = x + model.encode_positions(places)
    for block in model.blocks:
        x = _block(block, model.config, x)
    return _head(model, x, targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from logits, in float32: (B, T, V), int (B, T) -> (B, T)."""
    return logits.float().sparse_categorical_crossentropy(targets, reduction="none")


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all numbers in some tensors, a scalar."""
    sizes = [gradient.numel() for gradient in gradients]
    threads = count_threads(2 * sum(sizes))
    macros = {"SQUARES": 1, "GRADIENTS": _list("g", len(sizes)), **_sizes(sizes)}
    buffers = {"out": Tensor.empty(threads), **_numbered("g", gradients)}
    return _call("squares", buffers, ("out",), macros, threads)[0].sum()


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    square_means: Sequence[Tensor],
    decays: Sequence[float],
    betas: tuple[float, float],
    numbers: Tensor,
) -> list[Tensor]:
    """Update parameters and both running means in place: see `optim.Optimizer.updates`.

    Args:
        numbers: float32 (5,): rate, rate over the first bias correction, root of the second, the
            gradients' factor, and 0 to change nothing.
    Returns:
        the tensors to realise for it.
    """
    sizes = [parameter.numel() for parameter in parameters]
    names = {"PARAMETERS": "p", "MEANS": "m", "SQUARE_MEANS": "v", "GRADIENTS": "g"}
    macros = {
        "ADAMW": 1,
        **{macro: _list(name, len(sizes)) for macro, name in names.items()},
        **_sizes(sizes),
        "DECAYS": ", ".join(f"{decay!r}f" for decay in map(float, decays)),
    }
    for i, beta in enumerate(betas, 1):
        macros |= {f"BETA{i}": f"{float(beta)!r}f", f"REST{i}": f"{1 - float(beta)!r}f"}
    updated = [*parameters, *means, *square_means]
    buffers = _numbered("p", parameters) | _numbered("m", means) | _numbered("v", square_means)
    written = list(buffers)
    buffers |= _numbered("g", gradients) | {"numbers": numbers}
    found = _call("adamw", buffers, written, macros, count_threads(16 * sum(sizes)))
    for tensor, after in zip(updated, found, strict=True):
        tensor.replace(after)  # so that what reads it now waits for this
    return updated


def _embed(tokens: Tensor, table: Tensor, places: Tensor | None) -> Tensor:
    (B, T), (V, C) = tokens.shape, table.shape
    macros = {"B": B, "T": T, "C": C, "V": V}
    buffers = {"out": Tensor.empty(B, T, C), "ids": tokens}
    buffers |= {"tokens_weight": table, "places_weight": places}

    def gradient(g: UOp, call: UOp) -> tuple[UOp | None, ...]:
        shapes = {"d_tokens": table.shape, "d_places": None if places is None else places.shape}
        made = {n: None if s is None else Tensor.empty(*s) for n, s in shapes.items()}
        window = 0 if places is None else places.shape[0]
        sizes = macros | {"UNEMBED": 1, "WINDOW": window}
        given = {**made, "dout": Tensor(g), "ids": Tensor(call.src[2])}
        found = _call("unembed", given, [n for n in made if made[n] is not None], sizes, 1)
        return None, None, *(tensor.uop for tensor in found)

    return _call("embed", buffers, ("out",), macros | {"EMBED": 1}, 1, gradient)[0]


def _block(block: TransformerBlock, config: GPTConfig, x: Tensor) -> Tensor:
    B, T, C = x.shape
    parts = [f"attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.c_fc", "mlp.c_proj"]
    names = [f"{part}.{kind}" for part in ("ln_1", "ln_2", *parts) for kind in ("weight", "bias")]
    state = get_state_dict(block)
    weights = {name.replace(".", "_"): state.get(name) for name in names}
    F, H = state["mlp.c_fc.weight"].shape[0], config.n_head
    threads = min(B, count_threads(2 * B * T * sum(weight.numel() for weight in state.values())))
    macros = {
        "B": B, "T": T, "H": H, "D": C // H, "C": C, "F": F, "PRE_NORM": int(config.norm == "pre"),
        "SHORTCUT": int(config.shortcut), "EPSILON": f"{config.layer_norm_epsilon!r}f",
        "SCALE": f"{float(block.attn.scale)!r}f", "ACTIVATION": ACTIVATIONS[config.activation],
    }  # fmt: skip
    rows = B * T
    return _differentiable(
        ("block", "FORWARD", "BACKWARD"), Tensor.empty(B, T, C), x, {}, weights, macros, threads,
        kept=rows * (8 * C + 2 * F + 4) + B * H * T * T,
        room=rows * (7 * C + F) + threads * (T * T + 4 * C),
    )  # fmt: skip


def _head(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    (B, T, C), config = x.shape, model.config
    weight = (model.wte if config.tie_word_embeddings else model.lm_head).weight
    norm = model.ln_f if config.norm == "pre" else None
    rows, V = B * T, weight.shape[0]
    threads = min(rows, count_threads(2 * rows * V * C))
    macros = {
        "R": rows, "C": C, "V": V, "NORM": int(norm is not None),
        "EPSILON": f"{config.layer_norm_epsilon!r}f",
    }  # fmt: skip
    weights = {
        "ln_weight": norm and norm.weight,
        "ln_bias": norm and norm.bias,
        "weight": weight,
    }
    return _differentiable(
        ("head", "HEAD", "UNHEAD"), Tensor.empty(B, T), x, {"targets": targets}, weights, macros,
        threads, kept=rows * (C + 2 + V), room=rows * (V + C) + threads * 2 * C,
    )  # fmt: skip


def _differentiable(
    names: tuple[str, str, str],
    out: Tensor,
    x: Tensor,
    others: Mapping[str, Tensor],
    weights: Mapping[str, Tensor | None],
    macros: Mapping[str, object],
    threads: int,
    kept: int,
    room: int,
) -> Tensor:
    """The output of a kernel whose gradient is another one.

    Args:
        names: of the kernel, and the macros that choose the two functions in training.c.
        out: where the first writes; empty.
        others: what only the way forward reads, and has no gradient.
        kept: how many numbers the first keeps for the second, in `saved`.
        room: how many the second needs for itself, in `scratch`.
    """
    name, forward, backward = names
    buffers = {"out": out, "saved": Tensor.empty(kept), "x": x, **others, **weights}
    present = [name for name, weight in weights.items() if weight is not None]

    def gradient(g: UOp, call: UOp) -> tuple[UOp | None, ...]:
        made = {"dx": Tensor.empty(*x.shape), "scratch": Tensor.empty(room)}
        for weight in weights:
            made[f"d_{weight}"] = (
                Tensor.empty(*weights[weight].shape) if weight in present else None
            )
        saved, x_, *rest = (Tensor(source) for source in (call.src[2].after(call), *call.src[3:]))
        inputs = {"sync": meeting_place(), "dout": Tensor(g), "saved": saved, "x": x_}
        inputs |= dict.fromkeys(weights) | dict(zip(present, rest[len(others) :], strict=True))
        buffers = made | inputs
        written = ["dx", "scratch", *(f"d_{weight}" for weight in present), "sync"]
        found = _call(f"{name}_back", buffers, written, {**macros, backward: 1}, threads)
        grads = dict(zip(written, found, strict=True))
        nothing = [None] * len(others)
        return None, None, grads["dx"].uop, *nothing, *(grads[f"d_{w}"].uop for w in present)

    return _call(name, buffers, ("out", "saved"), {**macros, forward: 1}, threads, gradient)[0]


def _numbered(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}{i}": tensor for i, tensor in enumerate(tensors)}


def _list(name: str, count: int) -> str:
    return ", ".join(f"{name}{i}" for i in range(count))


def _sizes(sizes: Sequence[int]) -> dict[str, object]:
    return {"SIZES": ", ".join(map(str, sizes)), "COUNT": len(sizes)}


def _call(
    kind: str,
    buffers: Mapping[str, Tensor | None],
    written: Sequence[str],
    macros: Mapping[str, object],
    threads: int,
    gradient: Callable[[UOp, UOp], tuple[UOp | None, ...]] | None = None,
) -> list[Tensor]:
    """`kernels.call` for what is in training.c."""
    macros, sources = {**macros, "WEIGHT": "float"}, ("kernels.c", "training.c")
    return call(kind, buffers, written, macros, 0, None, gradient, sources, threads)
