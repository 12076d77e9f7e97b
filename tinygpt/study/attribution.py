"""Which parts of the model speak for a token: the logit as a sum of what each has added."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygpt.checkpoints.quantization import widened
from tinygpt.config import GPTConfig
from tinygpt.errors import InputError
from tinygpt.model import GPT
from tinygpt.runtime.buffers import tensor
from tinygpt.study.inside import Inside


@dataclass(frozen=True)
class Attribution:
    """A logit, or the difference of two, as the sum of N components.

    With the last layer norm's scale as it is for this text, the logit of a token t is the sum of
    <weight * (c - mean of c) / sigma, U_t> over all c that were added to the residual, and of
    <bias, U_t>.
    """

    components: tuple[str, ...]  # N of them, in the order in which they are added
    values: np.ndarray  # float64 (N,)
    logit: float  # what the model itself gives; the values' sum but for rounding


def attribute(
    model: GPT, inside: Inside, token: int, against: int | None = None, position: int = -1
) -> Attribution:
    """Take a logit apart.

    Args:
        token: whose logit.
        against: another token, whose logit is taken away.
        position: in the text; the logit is that of the token behind it.
    Raises:
        InputError: for a model whose residual is no sum, or a token or position that there is not.
    """
    config = model.config
    if why := no_sum(config):
        raise InputError(f"the logits of this model are no sum of its parts: {why}")
    for name, value in (("token", token), ("against", against)):
        if value is not None and not 0 <= value < config.vocab_size:
            raise InputError(f"{name} is {value}: it must be from 0 to {config.vocab_size - 1}")
    length = len(inside.ids)
    if not -length <= position < length:
        raise InputError(f"position is {position}: it must be from 0 to {length - 1}")
    parts = _parts(model, inside, position % length)
    head = widened(model.wte if config.tie_word_embeddings else model.lm_head).astype(np.float64)
    direction, logits = head[token], inside.logits[position].astype(np.float64)
    logit = logits[token]
    if against is not None:
        direction, logit = direction - head[against], logit - logits[against]
    last = inside.residuals[-1, position].astype(np.float64)
    sigma = np.sqrt(last.var() + config.layer_norm_epsilon)
    weight = model.ln_f.weight.numpy().astype(np.float64)
    values = {
        name: float(weight * (part - part.mean()) / sigma @ direction)
        for name, part in parts.items()
    }
    if model.ln_f.bias is not None:
        values["last norm's bias"] = float(model.ln_f.bias.numpy().astype(np.float64) @ direction)
    return Attribution(tuple(values), np.array([*values.values()]), float(logit))


def no_sum(config: GPTConfig) -> str | None:
    """Why the logits of such a model are no sum of what its parts add; None where they are one."""
    if config.norm != "pre":
        return "post-norm scales the sum in every block"
    return None if config.shortcut else "without shortcuts nothing is added up"


def _parts(model: GPT, inside: Inside, position: int) -> dict[str, np.ndarray]:
    """Each vector that is added to the residual of a position, float64 (C,), by its name."""
    heads, width = model.config.n_head, model.config.head_dim
    token, place = tensor(np.array([inside.ids[position]], np.int32)), np.array([position])
    found = {
        "token": model.wte(token).numpy()[0],
        "position": model.encode_positions(tensor(place.astype(np.int32))).numpy()[0],
    }
    for i, block in enumerate(model.blocks):
        before, half = inside.residuals[2 * i], inside.residuals[2 * i + 1, position]
        values = block.attn.v_proj(block.ln_1(tensor(before))).numpy().astype(np.float64)
        read = inside.attention[i, :, position].astype(np.float64)  # (H, T)
        out = widened(block.attn.out_proj).astype(np.float64)
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            found[f"block {i} head {h}"] = out[:, columns] @ (read[h] @ values[:, columns])
        added = block.mlp(block.ln_2(tensor(half[None]))).numpy()[0].astype(np.float64)
        biases = (("attn", block.attn.out_proj.bias), ("mlp", block.mlp.c_proj.bias))
        for name, bias in ((name, bias.numpy()) for name, bias in biases if bias is not None):
            found[f"block {i} {name} bias"] = bias
            added = added - bias if name == "mlp" else added
        found[f"block {i} mlp"] = added
    return {name: part.astype(np.float64) for name, part in found.items()}
