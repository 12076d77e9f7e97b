"""JSON from a stranger: read once, within limits, and nothing in it that could mean two things."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from tinygpt.errors import InputError, show

# A string, also one that does not end, or a bracket. It never goes back in what it has read.
_PART = re.compile(r'"(?:[^"\\]|\\.?)*+"?|[\[\]{}]', re.DOTALL)
DEEPEST = 32  # lists and objects within each other


def read_json(body: bytes) -> Any:
    """The value that some bytes say.

    Raises:
        InputError: for what is not UTF-8 or not JSON, is deeper than `DEEPEST`, has a name twice in
            one object, a number that is none, or half of a character.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8: byte {error.start} is out of place") from error
    if _depth(text) > DEEPEST:
        raise InputError(f"the body is deeper than {DEEPEST} lists or objects in each other")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_number
        )
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error
    except InputError:
        raise
    except ValueError as error:  # a whole number of too many digits
        raise InputError("the body has a number of too many digits") from error
    _check_characters(value)
    return value


def _depth(text: str) -> int:
    """How deep lists and objects lie in each other; brackets within strings are none."""
    deepest = depth = 0
    for part in _PART.finditer(text):
        if part[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif part[0] in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"the name {show(name)} stands twice in one object")
        found[name] = value
    return found


def _number(text: str) -> float:
    """A number; JSON does not tell 4.0 from 4."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _constant(name: str) -> NoReturn:
    raise InputError(f"{name} is no number of JSON")


def _check_characters(value: Any) -> None:
    """Refuse a string with half of a pair of surrogates, which no UTF-8 can say."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            fact = f"a text has half of a character, {value[error.start]!a}"
            raise InputError(f"{fact}: give both surrogates, or the character itself") from error
    elif isinstance(value, dict):
        for name, each in value.items():
            _check_characters(name)
            _check_characters(each)
    elif isinstance(value, list):
        for each in value:
            _check_characters(each)
