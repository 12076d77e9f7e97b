"""A model over several devices: by its blocks, by its heads, or the whole of it on each."""

from __future__ import annotations

from collections.abc import Iterable

from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.errors import InputError
from tinygpt.layers import Embedding, Linear
from tinygpt.model import GPT
from tinygpt.placement import Placement
from tinygpt.runtime import buffers, device

# Along which axis the parts of a layer's matrix lie, where heads are split. The first layers of a
# sublayer give each device the channels that it goes on with, so that their biases are cut too; of
# the last one each device computes a share of the sum.
_AXES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "out_proj": 1, "c_fc": 0, "c_proj": 1}
# Each device's part of the vocabulary has a multiple of so many rows, or a product with it is much
# slower: see `ops.plain`.
_ROWS = 32


def share_blocks(model: GPT, count: int) -> None:
    """Move the blocks of a model to so many devices, the first of which is that in use.

    Each has a run of blocks, and they work one after the other: what is gained is room. The
    embeddings, the last norm and the output projection stay on the first. Every number is what it
    would be on one device. As with the others here, a model without values yet stays without.

    Raises:
        InputError: when there are more devices than blocks, or fewer on the machine.
    """
    model.placement.need_whole()
    layers = len(model.blocks)
    if not 1 <= count <= layers:
        fact = f"{count} devices, and the model has {layers} blocks to share out"
        raise InputError(f"{fact}: give 1 to {layers} (--devices)")
    names = device.several(count)
    model.placement = Placement(model.config, "layers", tuple(names) if count > 1 else ())
    place_of = {
        id(tensor): model.placement.block(i)
        for i, block in enumerate(model.blocks)
        for tensor in get_state_dict(block).values()
    }
    for tensor in get_state_dict(model).values():
        _lay(tensor, place_of.get(id(tensor)) or names[0])


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
    fitting = [n for n in range(2, heads + 1) if heads % n == hidden % n == 0]
    if count == 1:
        share_blocks(model, 1)
        return
    if count not in fitting:
        instead = f"give {_any_of(fitting)} (--devices), or" if fitting else "take"
        raise InputError(
            f"{count} devices, and the model has {heads} head{'s' * (heads > 1)} and {hidden} "
            f"hidden channels, which they cannot share evenly: {instead} --split layers"
        )
    names = tuple(device.several(count))
    tables: list[Embedding | Linear] = [model.wte]
    if not config.tie_word_embeddings:
        tables.append(model.lm_head)
    rows = -(-config.vocab_size // (count * _ROWS)) * count * _ROWS
    for table in tables:
        table.weight = buffers.laid(table.weight, names, 0, rows)
        if table.scale is not None:
            table.scale = buffers.laid(table.scale, names, 0, rows)
    for name, tensor in get_state_dict(model).items():
        axis = _AXES.get(name.split(".")[-2])
        _lay(tensor, names, None if axis == tensor.ndim else axis)  # a bias is added to the whole
    model.placement = Placement(config, "heads", names)


def copy_to_all(model: GPT, count: int) -> None:
    """Give each of so many devices the whole of a model, to be trained with a part of each batch.

    Raises:
        InputError: when the machine has fewer.
    """
    model.placement.need_whole()
    if count < 1:
        raise InputError(f"{count} devices: give 1 or more (--devices)")
    names = tuple(device.several(count))
    model.placement = Placement(model.config, "batch", names if count > 1 else ())
    for tensor in get_state_dict(model).values():
        _lay(tensor, names if count > 1 else names[0])


def _lay(tensor: Tensor, place: buffers.Place, axis: int | None = None) -> None:
    if tensor.device != place:
        tensor.replace(buffers.laid(tensor, place, axis))


def _any_of(numbers: Iterable[int]) -> str:
    """2, 4 or 8."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
