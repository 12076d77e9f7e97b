"""The published tests of understanding: HellaSwag and LAMBADA."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygpt.errors import CheckpointError, InputError, reason, show
from tinygpt.evaluation.losses import Scorer
from tinygpt.model import NOT_NUMBERS
from tinygpt.storage import read_bytes
from tinygpt.tokenizer.encoding import encode
from tinygpt.tokenizer.tokenizer import Tokenizer

_MOST_BYTES = 256 << 20  # of a test's file: several times the largest


class Scored(NamedTuple):
    """A continuation's summed loss in nats, its tokens, and whether greedy decoding gives it."""

    loss: float
    tokens: int
    greedy: bool


def score_continuation(scorer: Scorer, context: Sequence[int], text: Sequence[int]) -> Scored:
    """How likely a model finds `text` after `context`; of a long context the last part is read.

    Raises:
        InputError: when the text alone does not fit into the window, one of the two is empty, or
            the model's logits are no numbers.
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
    loss = float(losses.sum(dtype=np.float64))
    if not math.isfinite(loss):
        raise InputError(NOT_NUMBERS)
    return Scored(loss, len(text), bool(hits.all()))


def hellaswag(scorer: Scorer, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
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


def lambada(scorer: Scorer, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
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
        # Not splitlines: JSON allows in a text what that takes for line ends, such as U+2028.
        lines = read_bytes(path, _MOST_BYTES).decode().split("\n")
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
