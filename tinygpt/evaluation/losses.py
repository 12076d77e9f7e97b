"""How well a model predicts: loss on prepared tokens, and the published tests of understanding."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tinygrad import Tensor, TinyJit

from tinygpt import hub
from tinygpt.config import InputError, show
from tinygpt.data import Dataset
from tinygpt.files import CheckpointError, reason
from tinygpt.fused import cross_entropy, token_losses
from tinygpt.model import GPT
from tinygpt.tokenizer import encode, load_tokenizer

if TYPE_CHECKING:
    from tiktoken import Encoding

# int32 (B, T) inputs and targets -> float32 (B, T), the targets' losses in nats.
Losses = Callable[[np.ndarray, np.ndarray], np.ndarray]
_TASKS = ("hellaswag", "lambada")


class Scorer:
    """A model's losses, and where its likeliest token was the right one; one graph a shape."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._graphs: dict[tuple, TinyJit] = {}

    def __call__(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 (B, T) twice -> losses, float32 (B, T), and hits, bool (B, T)."""
        losses, hits = self._run(self._score, inputs, targets)
        return losses, hits > 0

    def losses(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The losses alone, which is faster."""
        return self._run(self._losses, inputs, targets)

    def _run(self, function, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        key = function.__name__, inputs.shape
        if key not in self._graphs:
            self._graphs[key] = TinyJit(Tensor.train(mode=False)(function))
            self._graphs[key].cnt = 1  # captured at its first call: there is no state to set up
        return self._graphs[key](Tensor(inputs).realize(), Tensor(targets).realize()).numpy()

    def _score(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs).contiguous()
        hits = logits.argmax(-1) == targets
        return Tensor.stack(cross_entropy(logits, targets), hits.float()).realize()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return token_losses(self.model, inputs, targets).realize()


class Window(NamedTuple):
    """A place in a text: where the window starts, and how many targets at its end count."""

    start: int
    counted: int


def windows(length: int, block_size: int, stride: int) -> list[Window]:
    """Windows in which each of a text's tokens but the first is a target that counts, once.

    Args:
        length: of the text in tokens, at least block_size + 1.
        block_size: of each window; all are whole, so the last may overlap the one before.
        stride: how far the next window is: tokens that it sees before those that count are
            block_size - stride.
    """
    found = [Window(0, block_size)]
    while (done := found[-1].start + block_size) < length - 1:
        start = min(found[-1].start + stride, length - 1 - block_size)
        found.append(Window(start, start + block_size - done))
    return found


def spread(length: int, block_size: int, most: int) -> list[Window]:
    """At most so many windows beside each other, spread evenly over a text."""
    places = (length - 1) // block_size
    chosen = np.linspace(0, places - 1, min(places, most)).astype(int)
    return [Window(int(place) * block_size, block_size) for place in chosen]


def mean_loss(
    losses: Losses, tokens: np.ndarray, places: Sequence[Window], block_size: int, batch_size: int
) -> float:
    """The mean of the losses that count, in nats a token.

    Args:
        losses: of inputs and targets (batch_size, block_size).
        tokens: (N,) ids.
        places: from `windows` or `spread`.
    """
    total, steps = 0.0, np.arange(block_size + 1)
    for first in range(0, len(places), batch_size):
        group = places[first : first + batch_size]
        rows = [*group, *[group[-1]] * (batch_size - len(group))]  # one shape for all
        text = np.stack([tokens[window.start + steps] for window in rows]).astype(np.int32)
        found = losses(text[:, :-1].copy(), text[:, 1:].copy())
        for row, window in zip(found, group, strict=False):
            total += row[block_size - window.counted :].sum(dtype=np.float64)
    return total / sum(window.counted for window in places)


def evaluate_data(
    model: GPT, data: Dataset, split: str = "val", stride: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Loss and what follows from it on a split of prepared tokens.

    Args:
        stride: see `windows`; None is the whole window, the fastest.
    Returns:
        loss (nats a token), perplexity, bits_per_byte and bits_per_character of the split's text,
        tokens (how many were predicted).
    Raises:
        InputError: when the stride or the data does not fit the model.
    """
    tokens, block_size = getattr(data, split), model.config.block_size
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise InputError(f"stride is {stride}: it must be from 1 to the window, {block_size}")
    if len(tokens) < 2:
        raise InputError(f"{data.folder}: {split} has {len(tokens)} tokens: at least 2 are needed")
    data.check(model.config.vocab_size)
    block_size = min(block_size, len(tokens) - 1)
    places = windows(len(tokens), block_size, stride)
    batch_size = min(batch_size, len(places))
    loss = mean_loss(Scorer(model).losses, tokens, places, block_size, batch_size)
    text = data.header.splits[split]
    bits = loss / math.log(2) * text.tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits / max(1, text.bytes),
        "bits_per_character": bits / max(1, text.characters),
        "tokens": len(tokens) - 1,
    }


class Scored(NamedTuple):
    """A continuation's summed loss in nats, its tokens, and whether greedy decoding gives it."""

    loss: float
    tokens: int
    greedy: bool


def score_continuation(scorer: Scorer, context: Sequence[int], text: Sequence[int]) -> Scored:
    """How likely a model finds `text` after `context`; of a long context the last part is read.

    Raises:
        InputError: when the text alone does not fit into the window, or one of the two is empty.
    """
    block_size = scorer.model.config.block_size
    if not context or not 0 < len(text) <= block_size:
        raise InputError(
            f"a continuation of {len(text)} tokens after {len(context)}: both must have some, and "
            f"the window holds {block_size}"
        )
    ids = [*context, *text][-block_size - 1 :]
    length = len(ids) - 1
    room = min(block_size, 1 << (length - 1).bit_length())  # few shapes, so few graphs
    inputs, targets = np.zeros((2, 1, room), np.int32)
    inputs[0, :length], targets[0, :length] = ids[:-1], ids[1:]
    losses, hits = (found[0, length - len(text) : length] for found in scorer(inputs, targets))
    return Scored(float(losses.sum(dtype=np.float64)), len(text), bool(hits.all()))


def hellaswag(scorer: Scorer, tokenizer: Encoding, path: Path) -> dict[str, Any]:
    """Accuracy at choosing the ending of a story: HellaSwag's published JSON lines.

    Returns:
        examples; accuracy by the endings' likelihood; accuracy_normalised by that per token.
    Source: Zellers et al. 2019; scored as in build-nanogpt's hellaswag.py.
    """
    right = normalised = count = 0
    for line, example in _examples(path):
        match example:
            case {
                "ctx": str(context),
                "endings": [_, *_] as endings,
                "label": int() | str() as label,
            }:
                pass
            case _:
                raise CheckpointError(f"{path}:{line}: it needs ctx, endings and label")
        if str(label) not in map(str, range(len(endings))):
            raise CheckpointError(f"{path}:{line}: label {show(label)} names no ending")
        start = encode(tokenizer, context)
        texts = [encode(tokenizer, f" {ending}") for ending in endings]
        scores = [score_continuation(scorer, start, text) for text in texts]
        sums = [score.loss for score in scores]
        means = [score.loss / score.tokens for score in scores]
        right += sums.index(min(sums)) == int(label)
        normalised += means.index(min(means)) == int(label)
        count += 1
    return {
        "examples": count,
        "accuracy": right / count,
        "accuracy_normalised": normalised / count,
    }


def lambada(scorer: Scorer, tokenizer: Encoding, path: Path) -> dict[str, Any]:
    """Predicting a passage's last word: LAMBADA's JSON lines, as OpenAI published them.

    Returns:
        examples; accuracy of greedy decoding; perplexity of the last word.
    Source: Paperno et al. 2016; scored as `lambada_openai` in lm-evaluation-harness.
    """
    right, total, count = 0, 0.0, 0
    for line, example in _examples(path):
        text = example.get("text")
        context, space, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
        if not context or not word:
            raise CheckpointError(f"{path}:{line}: it needs a text of two words or more")
        ids = encode(tokenizer, context), encode(tokenizer, space + word)
        score = score_continuation(scorer, *ids)
        right += score.greedy
        total += score.loss
        count += 1
    return {
        "examples": count,
        "accuracy": right / count,
        "perplexity": math.exp(min(total / count, 700.0)),
    }


def _examples(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file, each with the number of its line; at least one."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise CheckpointError(f"{path}: it holds no examples")
    for number, line in lines:
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}:{number}: its JSON is damaged: {error}") from error
        if not isinstance(example, dict):
            raise CheckpointError(f"{path}:{number}: {show(example)} is not an object")
        yield number, example


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinygpt evaluate`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a name to fetch, such as gpt2")
    add("data", metavar="DATA", help=f"a folder of prepared tokens, or {' or '.join(_TASKS)}")
    add("file", nargs="?", metavar="FILE", help="of hellaswag or lambada: its JSON lines")
    add("--split", choices=("train", "val"), default="val", help="of DATA (default: val)")
    add("--stride", type=int, metavar="N", help="move the window by N tokens (default: all of it)")
    add("--tokenizer", metavar="T", help="gpt2, bytes, or a folder (default: the model's own)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`tinygpt evaluate`: print the numbers, one a line."""
    if (args.data in _TASKS) != (args.file is not None):
        raise InputError(f"FILE goes with {' and '.join(_TASKS)}, and with them alone")
    folder = hub.resolve(args.model)
    data = None if args.file else Dataset.open(args.data)  # before the model's seconds
    model = GPT.from_pretrained(folder)
    if data:
        found = evaluate_data(model, data, args.split, args.stride)
    else:
        tokenizer = load_tokenizer(args.tokenizer or folder, model.config.vocab_size)
        task = hellaswag if args.data == "hellaswag" else lambada
        found = task(Scorer(model), tokenizer, Path(args.file))
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            print(f"{name.replace('_', ' '):>20}  {shown}", file=sys.stdout)
    return 0
