"""Why pre-norm, why shortcuts, why warm-up: many small models trained one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from tinygpt.config import GPTConfig
from tinygpt.data.dataset import Batches
from tinygpt.layers import Record
from tinygpt.model import GPT
from tinygpt.runtime import buffers
from tinygpt.runtime.capture import capture
from tinygpt.study.explain import similarity
from tinygpt.training.settings import TrainConfig
from tinygpt.training.step import Counters, Trainer

Kind = Literal["pre", "post", "deep", "no shortcut"]

STEPS, EVERY = 300, 25
WIDTH, HEADS, WINDOW, BATCH = 64, 4, 64, 8
KINDS: tuple[Kind, ...] = ("pre", "post", "deep", "no shortcut")
_LAST = 20  # losses whose mean is a cell's result
_MEASURED = 8  # batches over which the gradients at the start are averaged


class Cell(NamedTuple):
    """One small model, and how it is trained."""

    kind: Kind
    init: Literal["gpt2", "xavier"]
    depth: int
    rate: float
    warmup: int
    seed: int = 0


# Those of twelve blocks that a table of another program has: they are trained with three seeds.
KNOWN = [
    *(Cell("pre", "gpt2", 12, rate, 0) for rate in (1e-3, 3e-3)),
    *(Cell("post", "gpt2", 12, rate, warmup) for rate in (1e-3, 3e-3) for warmup in (0, 100)),
    *(
        Cell(kind, "xavier", 12, rate, warmup)
        for kind in KINDS[:2] for rate in (1e-3, 3e-3) for warmup in (0, 100)
    ),
    *(Cell("deep", "xavier", 12, rate, 0) for rate in (1e-3, 3e-3)),
    Cell("no shortcut", "xavier", 12, 1e-3, 0),
    Cell("no shortcut", "gpt2", 12, 1e-3, 0),
]  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What one cell came to. Lists of E are measured at the start and after every 25 steps.

    A residual stands at 1 + L places: behind the embeddings and behind each block.
    """

    cell: Cell
    losses: list[float]  # of the 300 steps, in nats; fewer where one was no number
    gradients: list[list[list[float]]]  # (E, L, 6): lengths, in the order of a block's matrices
    norms: list[list[float]]  # (E, 1 + L): the mean length of a residual's vectors
    similarity: list[list[float]]  # (E, 1 + L): the mean cosine of two tokens' vectors
    rank: list[list[float]]  # (E, 1 + L): ||X - its mean row|| / ||X||

    @property
    def result(self) -> float:
        """The mean of the last losses, in nats."""
        return float(np.mean(self.losses[-_LAST:]))

    def verdict(self, unigram: float) -> str:
        """What became of it, by rule; `unigram` is what a guess by frequency alone costs."""
        if not np.isfinite(self.losses).all():
            return "diverged"
        if abs(self.result - unigram) <= 0.05:
            return "stuck"
        return "learns" if self.result < unigram - 0.3 else "between"


@dataclass(frozen=True)
class Norms:
    """What came of all cells."""

    unigram: float  # in nats: what guessing each token by its frequency costs
    bigram: float  # the same, by the token before it
    trained: list[Trained]


def cells(quick: bool = False) -> list[Cell]:
    """All that are trained, those of one shape beside each other; the quick ones are `KNOWN`."""
    if quick:
        return KNOWN
    inits: tuple[Literal["gpt2", "xavier"], ...] = ("gpt2", "xavier")
    grid = [
        Cell(kind, init, depth, rate, warmup)
        for kind, depth in product(KINDS, (2, 6, 12))
        for init, rate, warmup in product(inits, (1e-3, 3e-3), (0, 100))
    ]
    again = [cell._replace(seed=seed) for cell in KNOWN for seed in (1, 2)]
    return sorted([*grid, *again], key=shape_of)


def shape_of(cell: Cell) -> tuple[int, str, int]:
    """What decides the shape of its model: cells that have it in common are trained faster."""
    return KINDS.index(cell.kind), cell.init, cell.depth


def entropies_of(ids: np.ndarray) -> tuple[float, float]:
    """What it costs to guess each token by frequency alone, and by the token before, in nats.

    Args:
        ids: int (N,), the text.
    """
    single = np.bincount(ids)
    pairs = np.zeros((len(single), len(single)))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    share = single[single > 0] / single.sum()
    alone = -(share * np.log(share)).sum()
    before, after = np.nonzero(pairs)
    counts = pairs[before, after]
    given = -(counts * np.log(counts / pairs.sum(1)[before])).sum() / pairs.sum()
    return float(alone), float(given)


def train_cells(some: Iterable[Cell], ids: np.ndarray, steps: int = STEPS) -> Iterator[Trained]:
    """Train cells in turn; those of one shape, beside each other, share one captured step.

    Args:
        ids: int (N,), the text in tokens, of which those from 0 to the highest are the vocabulary.
        steps: of each; with 0 there are only the measures at the start.
    """
    bench: _Bench | None = None
    for cell in some:
        if bench is None or bench.shape != shape_of(cell):
            bench = _Bench(cell, int(ids.max()) + 1)
        yield bench.run(cell, ids, steps)


class _Bench:
    """A model of one shape, what trains it, and what measures it: captured once for many cells."""

    def __init__(self, cell: Cell, vocab_size: int) -> None:
        self.shape = shape_of(cell)
        self.model = GPT(config_of(cell, vocab_size))
        self.settings = TrainConfig(
            batch_size=BATCH, block_size=WINDOW, steps=STEPS, schedule="constant",
            weight_decay=0.1, grad_clip=0.0,
        )  # fmt: skip
        self.trainer = Trainer(self.model, self.settings)
        named = get_state_dict(self.model)
        self.lengths = capture(self._lengths, named, (*self.shape, Norms))
        self.states = capture(self._states, named, (*self.shape, Norms))

    def run(self, cell: Cell, ids: np.ndarray, steps: int) -> Trained:
        """Train one cell from its start."""
        self.model.init_weights(cell.seed, cell.init)
        for tensor in self.trainer.optimizer.state.values():
            buffers.write(tensor, np.zeros(tensor.shape, np.float32))
        self.trainer.counters = Counters()
        self.trainer.config = replace(
            self.settings, learning_rate=cell.rate, warmup_steps=cell.warmup, seed=cell.seed
        )
        batches, losses, measured = Batches(ids, BATCH, WINDOW, cell.seed), list[float](), []
        for step in range(steps + 1):
            if step % EVERY == 0:
                measured.append(self._measure(ids, 1 if step else _MEASURED))
            if step == steps:
                break
            losses.append(self.trainer.step([next(batches)]).loss)
            if not np.isfinite(losses[-1]):
                break
        parts: list[Any] = [list(each) for each in zip(*measured, strict=True)]
        return Trained(cell, losses, *parts)

    def _measure(self, ids: np.ndarray, count: int) -> tuple[list, ...]:
        """Gradients' lengths, the mean over some batches; and of one text's residuals the length,
        the similarity, and what is not the same for all tokens."""
        batches = Batches(ids, BATCH, WINDOW, seed=10**6)  # the same for all
        found = []
        for _ in range(count):
            inputs, targets = next(batches)
            lengths = self.lengths(buffers.tensor(inputs), buffers.tensor(targets))
            found.append(buffers.read(lengths).reshape(lengths.shape).copy())
        text = buffers.tensor(inputs[:1].copy())
        states = buffers.read(self.states(text)).astype(np.float64)
        residuals = states.reshape(-1, WINDOW, WIDTH)
        return (
            np.mean(found, 0).tolist(),
            [float(np.linalg.norm(x, axis=-1).mean()) for x in residuals],
            [similarity(x) for x in residuals],
            [float(np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x)) for x in residuals],
        )

    def _lengths(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """float32 (L, 6): how long the gradient of each block's matrices is."""
        _, gradients = self.trainer.gradients(tokens, targets)
        lengths = [
            gradients[f"blocks.{i}.{name}.weight"].square().sum().sqrt()
            for i, block in enumerate(self.model.blocks)
            for name, _ in block.linears()
        ]
        return Tensor.stack(*lengths).reshape(len(self.model.blocks), -1).realize()

    def _states(self, tokens: Tensor) -> Tensor:
        """float32 (1 + L, T, C)."""
        record = Record()
        self.model.hidden_states(tokens, record=record)
        return Tensor.stack(*(state[0] for state in record.hidden_states)).realize()


def config_of(cell: Cell, vocab_size: int) -> GPTConfig:
    """The shape of a cell's model.

    With GPT-2's initialisation the output projection is the token embedding, as in GPT-2; Xavier's
    embeddings are too large for that, so there it is one of its own.
    """
    shortcut = cell.kind != "no shortcut"
    return GPTConfig(
        cell.depth, HEADS, WIDTH, WINDOW, vocab_size, norm=cell.kind if shortcut else "pre",
        shortcut=shortcut, tie_word_embeddings=cell.init == "gpt2",
    )  # fmt: skip
