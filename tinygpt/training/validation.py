"""The validation loss of a run, which its ranks share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinygpt.data.dataset import Dataset
from tinygpt.errors import InputError
from tinygpt.evaluation.losses import Scorer, spread, sum_of_losses
from tinygpt.model import GPT
from tinygpt.training.ranks import Alone
from tinygpt.training.settings import TrainConfig


class Validation:
    """Windows spread over the validation split, of which each rank computes its part."""

    def __init__(self, model: GPT, data: Dataset, config: TrainConfig, ranks: Alone) -> None:
        """
        Raises:
            InputError: when the split is shorter than a window.
        """
        if len(data.val) <= config.block_size:
            raise InputError(
                f"{data.folder}: the validation split has {len(data.val)} tokens, too few for a "
                f"window of {config.block_size}: give more text or a smaller --block-size"
            )
        self.scorer, self.tokens, self.ranks = Scorer(model), data.val, ranks
        places = spread(len(data.val), config.block_size, config.eval_batches * config.batch_size)
        self.places = ranks.part(places)
        self.shape = config.batch_size // ranks.size, config.block_size

    def loss(self, before_each: Callable[[], None]) -> float:
        """The mean over all windows, in nats a token.

        Args:
            before_each: called before each batch; where it raises, that is the end.
        """

        def losses(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
            before_each()
            return self.scorer.losses(inputs, targets)

        if self.ranks.size > 1:  # a part may have no window at all
            empty = np.zeros(self.shape, np.int32)
            self.ranks.in_turn("losses", lambda: losses(empty, empty))
        batch_size, block_size = self.shape
        found = sum_of_losses(losses, self.tokens, self.places, block_size, batch_size)
        total, count = self.ranks.total(*found)
        before_each()
        return total / count
