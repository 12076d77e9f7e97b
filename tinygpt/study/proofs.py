"""That what is shown of a model adds up, and that every way of computing it gives the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tinygrad.nn.state import get_state_dict

from tinygpt.model import GPT
from tinygpt.runtime import device
from tinygpt.study.attribution import attribute, no_sum
from tinygpt.study.inside import in_window, look, unembedded
from tinygpt.study.reference import Reference

TOLERANCE = 1e-4  # of the largest number that is compared


@dataclass(frozen=True)
class Proof:
    """Two ways to the same numbers, and how far apart they are."""

    claim: str
    difference: float  # the largest
    scale: float  # the largest of the numbers

    @property
    def holds(self) -> bool:
        """Whether the difference is as small as rounding makes it."""
        return self.difference <= TOLERANCE * self.scale


def prove(model: GPT, ids: Sequence[int]) -> list[Proof]:
    """Compute the logits of a text in each way that there is.

    Args:
        model: its weights in float32, so that nothing else than rounding may differ.
        ids: of the text, at least one.
    """
    ids = in_window(model, ids)
    with plain_operations():
        plain = model([ids]).numpy()[0]
    found = [_proof("plain tensors = NumPy's reference in float64", plain, _reference(model, ids))]
    own = model([ids]).numpy()[0]
    if device.takes_c(device.default()):
        found.append(_proof("operations in C = plain tensors", own, plain))
    found.append(_proof("with a cache, in pieces = at once", _in_pieces(model, ids), own))
    found.append(_proof("in a batch = alone", model([ids, ids[::-1]]).numpy()[0], own))
    inside = look(model, ids)
    last = unembedded(model, inside.residuals[-1])
    found.append(_proof("the lens behind the last block = the logits", last, own))
    if no_sum(model.config) is None:
        tokens = np.argsort(-own[-1])[:5]
        parts = [attribute(model, inside, int(token)).values.sum() for token in tokens]
        claim = "the parts of a logit sum to it, for 5 tokens"
        found.append(_proof(claim, np.array(parts), own[-1][tokens]))
    return found


@contextmanager
def plain_operations() -> Iterator[None]:
    """Compute with the operations' definitions in plain tensors."""
    before = os.environ.get("TINYGPT_KERNELS")
    os.environ["TINYGPT_KERNELS"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TINYGPT_KERNELS"]
        else:
            os.environ["TINYGPT_KERNELS"] = before


def _reference(model: GPT, ids: list[int]) -> np.ndarray:
    weights = {name: weight.numpy() for name, weight in get_state_dict(model).items()}
    return Reference(model.config, weights).row(np.array(ids))


def _in_pieces(model: GPT, ids: list[int]) -> np.ndarray:
    """The logits of all tokens, the last by itself and those before in two halves."""
    cache, found = model.empty_cache(1, model.config.block_size), []
    edges = sorted({0, len(ids) // 2, max(0, len(ids) - 1), len(ids)})
    for start, stop in pairwise(edges):
        found.append(model([ids[start:stop]], cache, start).numpy()[0])
    return np.concatenate(found)


def _proof(claim: str, ours: np.ndarray, other: np.ndarray) -> Proof:
    return Proof(claim, float(np.abs(ours - other).max()), float(np.abs(other).max()))
