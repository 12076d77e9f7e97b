"""Token ids as people hand them over: lists, arrays, tensors. What has one meaning is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes

from tinygpt.errors import InputError, show


def read_ids(given: Any, may_be_none: bool = False) -> np.ndarray:
    """Ids as an array of whole numbers, not yet compared with any vocabulary.

    Args:
        given: whole numbers in lists, tuples, a range, a NumPy array, or a tensor of any library
            that NumPy can read.
        may_be_none: whether there may be 0 of them.
    Returns:
        whole numbers in the shape that was given.
    Raises:
        InputError: for anything else.
    """
    if isinstance(given, str | bytes):
        raise InputError(f"{show(given)} is text: encode it first, with the model's tokenizer")
    try:
        readable = _readable(given)
    except RecursionError as error:
        raise InputError(_refusal(given, "a list that holds itself")) from error
    try:
        ids = np.asarray(readable)
    except Exception as error:  # whatever the method of another library's tensor raises
        raise InputError(_refusal(given, "rows of different lengths, or no numbers")) from error
    if ids.size == 0:
        if may_be_none:
            return ids.astype(np.int64)
        raise InputError("no ids are given, it is empty: give at least one token")
    if ids.dtype.kind not in "iu":
        raise InputError(_refusal(given, f"of type {getattr(given, 'dtype', ids.dtype)}"))
    return ids


def _readable(given: Any) -> Any:
    """What NumPy can read: it can read no tensor of tinygrad's, and would lose what is masked."""
    if isinstance(given, Tensor):
        return given.numpy() if dtypes.is_int(given.dtype) else np.empty(1, object)
    if np.ma.is_masked(given):
        raise InputError(_refusal(given, "masked in part"))
    return [_readable(each) for each in given] if isinstance(given, list | tuple) else given


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
