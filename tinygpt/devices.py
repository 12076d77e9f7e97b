"""A model over several devices: its blocks shared out, in their order."""

from __future__ import annotations

from tinygrad.nn.state import get_state_dict

from tinygpt.errors import InputError
from tinygpt.model import GPT
from tinygpt.runtime import buffers, device


def share_blocks(model: GPT, count: int) -> None:
    """Move the blocks of a model to so many devices, the first of which is that in use.

    Each has a run of blocks, and they work one after the other: what is gained is room. The
    embeddings, the last norm and the output projection stay on the first. Every number is what it
    would be on one device.

    Raises:
        InputError: when there are more devices than blocks, or fewer on the machine.
    """
    blocks = model.blocks
    if not 1 <= count <= len(blocks):
        fact = f"{count} devices, and the model has {len(blocks)} blocks to share out"
        raise InputError(f"{fact}: give 1 to {len(blocks)} (--devices)")
    names = device.several(count)
    model.devices = [names[i * count // len(blocks)] for i in range(len(blocks))]
    for block, name in zip(blocks, model.devices, strict=True):
        for tensor in get_state_dict(block).values():
            if tensor.device != name:
                tensor.replace(buffers.tensor(tensor.numpy(), name))
