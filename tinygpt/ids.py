"""Token ids as people hand them over: lists, arrays, tensors. What has one meaning is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt.errors import InputError, show


def read_ids(given: Any) -> np.ndarray:
    """Ids as an array of whole numbers, not yet compared with any vocabulary.

    Args:
        given: whole numbers in lists, tuples, a range, a NumPy array, or a tensor of any library
            that NumPy can read; not empty.
    Returns:
        whole numbers in the shape that was given.
    Raises:
        InputError: for anything else.
    """
    if isinstance(given, str | bytes):
        raise InputError(f"{show(given)} is text: encode it first, with the model's tokenizer")
    try:
        if isinstance(given, Tensor):
            ids = given.numpy() if dtypes.is_int(given.dtype) else np.empty(1, object)
        else:
            ids = np.asarray(given)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(_refusal(given, "rows of different lengths, or no numbers")) from error
    if ids.size == 0:
        raise InputError("no ids are given, it is empty: give at least one token")
    if ids.dtype.kind not in "iu":
        raise InputError(_refusal(given, f"of type {getattr(given, 'dtype', ids.dtype)}"))
    return ids


def _refusal(given: Any, found: str) -> str:
    name = type(given).__name__
    return f"ids are {found} ({name}): give whole numbers, in rows of one length"


def check_range(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids that a model's vocabulary does not have."""
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise InputError(
            f"token {wrong.flat[0]} is outside the vocabulary: ids run from 0 to {vocab_size - 1}"
        )
