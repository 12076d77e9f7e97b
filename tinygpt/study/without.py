"""A model's text without some of its heads or blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from tinygrad import Tensor

from tinygpt.errors import InputError
from tinygpt.layers import TransformerBlock
from tinygpt.model import GPT
from tinygpt.runtime import buffers
from tinygpt.slots import Slots
from tinygpt.study.heads import with_heads


class _Optional:
    """A block that may be passed by."""

    def __init__(self, block: TransformerBlock, kept: Tensor) -> None:
        self.block, self.kept = block, kept  # float32 (1,): 0 where it is passed by

    def __call__(
        self,
        x: Tensor,
        cache: Any = None,
        start_pos: Any = 0,
        slots: Any = None,
        row: Any = None,
        key: Any = None,
        record: Any = None,
    ) -> Tensor:
        y = self.block(x, cache, start_pos, slots, row, key, record)
        given = x if row is None else x[:, row : row + 1]
        return (self.kept > 0).where(y, given).contiguous()


class Without:
    """One text at a time, of a model of which other parts may be left out each time.

    What is left out lies in tensors that the captured steps read, so that no step is made anew.
    With nothing left out the text is the model's own.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        self._shape = config.n_layer, config.n_head
        self._heads = [_ones(config.n_head) for _ in range(config.n_layer)]
        self._blocks = [_ones(1) for _ in range(config.n_layer)]
        self._model = with_heads(model, self._heads)  # held here: slots do not keep their model
        self._model.blocks = [
            _Optional(block, kept)
            for block, kept in zip(self._model.blocks, self._blocks, strict=True)
        ]
        self.slots = Slots(self._model, 1, serving=True)

    def leave_out(self, heads: Collection[tuple[int, int]], blocks: Collection[int]) -> None:
        """Choose what the next text does without; the slot is cleared.

        Args:
            heads: pairs of block and head, whose output is zero.
            blocks: what stands before and behind each of these is the same.
        Raises:
            InputError: for one that there is not.
        """
        check_parts(self._shape, heads, blocks)
        factors = np.ones(self._shape, np.float32)
        for place in heads:
            factors[place] = 0
        for i, (row, kept) in enumerate(zip(self._heads, self._blocks, strict=True)):
            buffers.write(row, factors[i])
            buffers.write(kept, np.array([i not in blocks], np.float32))
        self.slots.clear()


def check_parts(
    shape: tuple[int, int], heads: Collection[tuple[int, int]], blocks: Collection[int]
) -> None:
    """Refuse heads and blocks that a model of L blocks of H heads does not have.

    Raises:
        InputError: with the one, and the ranges.
    """
    layers, width = shape
    for block, head in heads:
        if not (0 <= block < layers and 0 <= head < width):
            raise InputError(
                f"heads has [{block}, {head}]: blocks are 0 to {layers - 1}, heads 0 to {width - 1}"
            )
    for block in blocks:
        if not 0 <= block < layers:
            raise InputError(f"blocks has {block}: blocks are 0 to {layers - 1}")


def _ones(size: int) -> Tensor:
    return buffers.tensor(np.ones(size, np.float32))
