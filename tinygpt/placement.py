"""Where a model lies: on the device in use, or on several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from tinygrad import Tensor

from tinygpt.config import GPTConfig
from tinygpt.errors import InputError
from tinygpt.runtime import device, memory
from tinygpt.runtime.buffers import Place, moved, tensor

# How a status line calls what lies on several devices, and what that costs where these are a CPU's.
_WORDS = {
    "layers": ("its blocks on ", "no faster"),
    "heads": ("its heads on ", "slower than one"),
    "batch": ("", "slower than one"),
}


@dataclass(frozen=True)
class Placement:
    """On which devices the parts of a model lie, and along which axis their tensors are cut."""

    config: GPTConfig
    # What each device has: a run of the blocks; some of the heads of each block, and as large a
    # part of all that has to do with them; or the whole model, and a part of each batch.
    split: Literal["layers", "heads", "batch"] = "layers"
    devices: tuple[str, ...] = ()  # several; empty: all is on the device in use

    @property
    def count(self) -> int:
        """On how many devices each tensor lies."""
        return len(self.rest) if isinstance(self.rest, tuple) else 1

    @property
    def rest(self) -> Place | None:
        """Where all but the blocks lies; None is the device in use."""
        if not self.devices:
            return None
        return self.devices[0] if self.split == "layers" else self.devices

    def block(self, layer: int) -> Place | None:
        """Where a block lies."""
        if self.devices and self.split == "layers":
            return self.devices[layer * len(self.devices) // self.config.n_layer]
        return self.rest

    @property
    def has_padding(self) -> bool:
        """Whether the matrices of the vocabulary are filled up with rows, and lie in parts."""
        return self.split == "heads" and bool(self.devices)

    def describe(self) -> str:
        """The backend, the form of the operations, and the devices: words for a status line."""
        found = f"{device.describe()}, {device.describe_operations(self.count)}"
        if not self.devices:
            return found
        words, cost = _WORDS[self.split]
        found += f", {words}{len(self.devices)} devices"
        shared = f" (which share the cores of one: it is {cost})"
        return found + (shared if device.default() == "CPU" else "")

    def require_memory(self, needed_bytes: int, what: str) -> None:
        """Refuse what the model's devices have no room for.

        Where they share the model, each is taken to have an equal part of it. By layers the first
        has the embeddings besides, so that a little too much may be let through.

        Raises:
            InputError: see `memory.require_memory`.
        """
        shared = self.split != "batch" and device.default() not in memory.SHARE_MEMORY
        parts = max(1, len(self.devices)) if shared else 1
        memory.require_memory(needed_bytes // parts, what)

    def cache(self, layer: int, values: np.ndarray) -> Tensor:
        """Keys or values of a block, (B, H, S, D), beside it."""
        return tensor(values, self.block(layer), 1 if self.split == "heads" else None)

    def parts(self, rows: int) -> int:
        """In how many parts so many rows of a batch lie on devices: one for each where it can."""
        return self.count if self.split == "batch" and rows % self.count == 0 else 1

    def batch(self, rows: np.ndarray) -> Tensor:
        """(B, ...) rows of a batch, or of something for each of its parts, on their devices."""
        return tensor(rows, self.rest, 0 if self.parts(len(rows)) > 1 else None)

    def on_one(self, part: Tensor, axis: int) -> Tensor:
        """What has an axis of the vocabulary, on the first device, and without padding."""
        if not isinstance(self.rest, tuple):
            return part
        part, size = moved(part, self.rest[0]), self.config.vocab_size
        return part.shrink_to(*(size if i == axis % part.ndim else None for i in range(part.ndim)))

    def joined(self, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output projection, (V, C) and (V,), on one device where each has a part of it."""
        if not self.has_padding:
            return weight, scale
        return self.on_one(weight, 0), None if scale is None else self.on_one(scale, 0)

    def need_whole(self) -> None:
        """Refuse a model whose matrices are no longer those that were loaded.

        Raises:
            InputError: where its heads are split.
        """
        if self.has_padding:
            raise InputError("the model's heads are split over devices: load it again for this")
