"""Where a model lies: on the device in use, or on several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from tinygpt.errors import InputError
from tinygpt.runtime.buffers import Place, moved, tensor


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model lie, and along which axis what they compute with is cut."""

    blocks: tuple[Place, ...] = ()  # where each block does; empty: all where the rest does
    # Where the embeddings, the last norm and the output projection do; None: on the device in use.
    rest: Place | None = None
    cache_axis: int | None = None  # of keys and values, where each of several devices has a part
    batch_axis: int | None = None  # of tokens, where each has the whole model
    vocab_size: int | None = None  # of the model, where its matrices were filled up with rows

    def need_whole(self) -> None:
        """Refuse a model whose matrices are no longer those that were loaded.

        Raises:
            InputError: where its heads are split.
        """
        if self.vocab_size is not None:
            raise InputError("the model's heads are split over devices: load it again for this")

    @property
    def count(self) -> int:
        """On how many devices each tensor lies."""
        return len(self.rest) if isinstance(self.rest, tuple) else 1

    def block(self, layer: int) -> Place | None:
        """Where a block lies."""
        return self.blocks[layer] if self.blocks else self.rest

    def cache(self, layer: int, values: np.ndarray) -> Tensor:
        """Keys or values of a block, (B, H, S, D), beside it."""
        return tensor(values, self.block(layer), self.cache_axis)

    def parts(self, rows: int) -> int:
        """In how many parts so many rows of a batch lie on devices: one for each where it can."""
        return self.count if self.batch_axis is not None and rows % self.count == 0 else 1

    def batch(self, rows: np.ndarray) -> Tensor:
        """(B, ...) rows of a batch, or of something for each of its parts, on their devices."""
        return tensor(rows, self.rest, self.batch_axis if self.parts(len(rows)) > 1 else None)

    def on_one(self, part: Tensor, axis: int) -> Tensor:
        """What has an axis of the vocabulary, on the first device, and without padding."""
        if not isinstance(self.rest, tuple):
            return part
        part = moved(part, self.rest[0])
        size = part.shape[axis] if self.vocab_size is None else self.vocab_size
        return part.shrink_to(*(size if i == axis % part.ndim else None for i in range(part.ndim)))

    def joined(self, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output projection, (V, C) and (V,), on one device where each has a part of it."""
        if self.vocab_size is None:
            return weight, scale
        return self.on_one(weight, 0), None if scale is None else self.on_one(scale, 0)
