from __future__ import annotations

import pytest
from conftest import randomize
from prepared import prepared

from tinygpt import GPT, InputError
from tinygpt.data.dataset import Dataset
from tinygpt.training.ranks import Alone
from tinygpt.training.settings import TrainConfig
from tinygpt.training.validation import Validation

CONFIG = TrainConfig(
    n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=6, eval_batches=3, sample_tokens=0
)


class OneOf(Alone):
    """A rank of several that are asked one after another."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size, self.given = rank, size, [0.0, 0.0]

    def part(self, items):
        return items[self.rank :: self.size]

    def total(self, *numbers):
        self.given = list(numbers)
        return self.given


def test_the_parts_of_ranks_are_the_whole(tmp_path):
    data = Dataset.open(prepared(tmp_path / "data"))
    model = randomize(GPT(CONFIG.gpt_config(data.header.vocab_size)))
    whole = Validation(model, data, CONFIG, Alone()).loss(lambda: None)
    given = []
    for rank in range(3):
        ranks = OneOf(rank, 3)
        Validation(model, data, CONFIG, ranks).loss(lambda: None)
        given.append(ranks.given)
    total, count = map(sum, zip(*given, strict=True))
    assert count == CONFIG.eval_batches * CONFIG.batch_size * CONFIG.block_size
    assert total / count == pytest.approx(whole, rel=1e-6)


def test_what_is_asked_before_each_batch_may_end_it(tmp_path):
    data = Dataset.open(prepared(tmp_path / "data"))
    model = randomize(GPT(CONFIG.gpt_config(data.header.vocab_size)))
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Validation(model, data, CONFIG, Alone()).loss(stop)
    assert len(calls) == 2


def test_a_split_shorter_than_a_window_is_refused(tmp_path):
    data = Dataset.open(prepared(tmp_path / "data", "1 times 1 is 1. " * 3))
    model = GPT(CONFIG.gpt_config(data.header.vocab_size), seed=0)
    with pytest.raises(
        InputError, match="validation split has 5 tokens, too few for a window of 8"
    ):
        Validation(model, data, CONFIG, Alone())
