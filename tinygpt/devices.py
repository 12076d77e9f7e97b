"""A model over several devices: by its blocks, by its heads, or the whole of it on each."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.errors import InputError
from tinygpt.layers import Embedding, Linear
from tinygpt.model import GPT
from tinygpt.placement import Placement
from tinygpt.runtime import buffers, device

# of its bias too. The first layers of a sublayer give each device the channels that it goes on
_AXES = {
    "wte": 0, "lm_head": 0, "q_proj": 0, "k_proj": 0, "v_proj": 0, "out_proj": 1, "c_fc": 0,
    "c_proj": 1,
}  # fmt: skip
_ROWS = 32


def share_blocks(model: GPT, count: int) -> None:
    """Move the blocks of a model to so many devices, the first of which is that in use.

    Each has a run of blocks, and they work one after the other: what is gained is room. The
    embeddings, the last norm and the output projection stay on the first. Every number is what it
    would be on one device.

    Raises:
        InputError: when there are more devices than blocks, or fewer on the machine.
    """
    model.placement.need_whole()
    layers = len(model.blocks)
    if not 1 <= count <= layers:
        fact = f"{count} devices, and the model has {layers} blocks to share out"
        raise InputError(f"{fact}: give 1 to {layers} (--devices)")
    names = device.several(count)
    places = [names[i * count // layers] for i in range(layers)]
    model.placement = Placement(tuple(places), names[0]) if count > 1 else Placement()
    for block, name in zip(model.blocks, places, strict=True):
        for tensor in get_state_dict(block).values():
            if tensor.device != name:
                tensor.replace(buffers.tensor(tensor.numpy(), name))


def split_heads(model: GPT, count: int) -> None:
    """Cut each block of a model, and its vocabulary, into equal parts on so many devices.

    Each has some of the heads with their keys and values, some of the hidden channels, and some of
    the vocabulary, which is filled up with rows of zeros where it does not divide. They work at the
    same time, and add up what they have at the end of each sublayer: so the last bits of a number
    may be others than on one device.

    Raises:
        InputError: when heads or hidden channels do not divide, or the machine has fewer devices.
    """
    model.placement.need_whole()
    config = model.config
    heads, hidden = config.n_head, config.inner_dim
    fitting = [n for n in range(1, heads + 1) if heads % n == hidden % n == 0]
    if count not in fitting:
        raise InputError(
            f"{count} devices, and the model has {heads} heads and {hidden} hidden channels, which "
            f"they cannot share evenly: give {_any_of(fitting)} (--devices), or --split layers"
        )
    if count == 1:
        return
    names = tuple(device.several(count))
    tables: list[Embedding | Linear] = [model.wte]
    if not config.tie_word_embeddings:
        tables.append(model.lm_head)
    for table in tables:
        table.weight = _filled_up(table.weight, count * _ROWS)
        table.scale = None if table.scale is None else _filled_up(table.scale, count * _ROWS)
    for name, tensor in get_state_dict(model).items():
        axis = _AXES.get(name.split(".")[-2])
        place = None if axis == tensor.ndim else axis  # a bias is added to the whole sum
        tensor.replace(buffers.tensor(tensor.numpy(), names, place))
    model.placement = Placement((), names, cache_axis=1, vocab_size=config.vocab_size)


def _filled_up(tensor: Tensor, size: int) -> Tensor:
    """(V, ...) with as many rows of zeros as make V a multiple of a size."""
    values = tensor.numpy()
    missing = [(0, -len(values) % size), *[(0, 0)] * (values.ndim - 1)]
    return buffers.tensor(np.pad(values, missing))


def copy_to_all(model: GPT, count: int) -> None:
    """Give each of so many devices the whole of a model, to be trained with a part of each batch.

    Raises:
        InputError: when the machine has fewer.
    """
    model.placement.need_whole()
    if count == 1:
        return
    names = tuple(device.several(count))
    for tensor in get_state_dict(model).values():
        tensor.replace(buffers.tensor(tensor.numpy(), names))
    model.placement = Placement((), names, batch_axis=0)


def _any_of(numbers: Iterable[int]) -> str:
    """1, 2 or 4."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
