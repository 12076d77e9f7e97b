"""The fields of a request to continue a text: what each may be, checked and described at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt.errors import InputError, check_bool, check_float, check_int, show, unknown
from tinygpt.server.problems import Problem

Schema = dict[str, Any]
_LONGEST_STOPS = 4
_BIASED = "(0|[1-9][0-9]{0,8})"  # an id as a key


@dataclass(frozen=True)
class Field:
    """One field: its check, which raises InputError, and the same in words of JSON Schema."""

    check: Callable[[str, Any], None]
    schema: Schema
    default: Any = None


def whole(default: int | None, low: int, most: int, words: str) -> Field:
    """A field that is a whole number."""
    schema = {"type": "integer", "minimum": low, "maximum": most, "description": words}
    return Field(lambda name, value: check_int(name, value, low, most + 1), schema, default)


def _number(words: str, **limits: float) -> Field:
    names = {"low": "minimum", "most": "maximum", "above": "exclusiveMinimum"}
    schema: Schema = {"type": "number", "description": words}
    schema |= {names[limit]: bound for limit, bound in limits.items()}
    return Field(lambda name, value: check_float(name, value, **limits), schema)


def yes_or_no(words: str, default: bool = False) -> Field:
    """A field that is true or false."""
    return Field(check_bool, {"type": "boolean", "description": words}, default)


def check_text(name: str, value: Any) -> None:
    """Refuse what is no text."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {show(value)}: it must be a text")


def _prompt(name: str, value: Any) -> None:
    """A text, texts, ids, or rows of ids."""
    kinds = {_kind(each) for each in value} if isinstance(value, list) else {None}
    if not isinstance(value, str) and (len(kinds) != 1 or None in kinds):
        raise InputError(
            f"{name} is {show(value)}: it must be a text, a list of texts, a list of ids, or a "
            "list of lists of ids, none of them empty"
        )


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if type(value) is int:
        return "id"
    ids = isinstance(value, list) and value and all(type(each) is int for each in value)
    return "row" if ids else None


def _stop(name: str, value: Any) -> None:
    several = value if isinstance(value, list) else [value]
    if len(several) > _LONGEST_STOPS or not all(isinstance(e, str) and e for e in several):
        raise InputError(
            f"{name} is {show(value)}: it must be a text, or up to {_LONGEST_STOPS}, none of them "
            "empty"
        )


def _bias(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {show(value)}: it must be an object of ids and numbers")
    for token, bias in value.items():
        if not re.fullmatch(_BIASED, token):
            raise InputError(f"{name} has the key {show(token)}: it must be an id")
        check_float(f"{name}.{token}", bias, low=-100, most=100)


def _stream_options(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {show(value)}: it must be an object")
    for key, each in value.items():
        if key != "include_usage":
            raise unknown(f"field of {name}", key, ["include_usage"])
        if each is not None:
            check_bool(f"{name}.{key}", each)


_ID = {"type": "integer", "minimum": 0}
_STRING = {"type": "string", "minLength": 1}
PROMPT: Schema = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": _ID, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": _ID, "minItems": 1}, "minItems": 1},
    ]
}
_WORDS = "as the model's files say, else "
COMPLETION: dict[str, Field] = {
    "model": Field(check_text, {"type": "string", "description": "one of /v1/models"}),
    "prompt": Field(_prompt, {**PROMPT, "description": "one text or several, or their ids"}, ""),
    "max_tokens": whole(None, 0, 2**31 - 1, "how many tokens to write at most; usually 16"),
    "temperature": _number(f"0 takes the likeliest ({_WORDS}0)", low=0),
    "top_p": _number("only the likeliest that together reach it", above=0, most=1),
    "top_k": whole(None, 0, 2**31 - 1, "only so many of the likeliest; 0 for all"),
    "min_p": _number("only those at least so many times as likely as the first", low=0, most=1),
    "n": whole(1, 1, 128, "how many texts for each prompt, each with the next seed"),
    "best_of": whole(None, 1, 128, "of so many texts, the n likeliest a token are given"),
    "stop": Field(
        _stop,
        {"anyOf": [_STRING, {"type": "array", "items": _STRING, "maxItems": _LONGEST_STOPS}],
         "description": "texts before the first of which the text ends"},
    ),
    "seed": whole(None, 0, 2**63 - 1, "gives the same texts again"),
    "logprobs": whole(None, 0, 20, "log-probabilities, and those of so many of the likeliest"),
    "echo": yes_or_no("let the text begin with the prompt"),
    "stream": yes_or_no("send each piece as it comes"),
    "stream_options": Field(
        _stream_options,
        {"type": "object", "additionalProperties": False,
         "properties": {"include_usage": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}}},
    ),
    "presence_penalty": _number("against tokens that are in the text at all", low=-2, most=2),
    "frequency_penalty": _number("against a token each time it is in the text", low=-2, most=2),
    "repetition_penalty": _number("above 1 against what is in prompt or text", above=0),
    "logit_bias": Field(
        _bias,
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100,
                                                    "maximum": 100},
         "propertyNames": {"pattern": f"^{_BIASED}$"},
         "description": "added to the logits of these ids"},
    ),
    "truncate_prompt": yes_or_no("read the end of a prompt that is too long, and refuse none"),
    "user": Field(lambda name, value: None, {"description": "not looked at"}),
}  # fmt: skip
# What OpenAI has and this has not, and what is said of it.
_REFUSED = {"suffix": "this model continues texts and fills no gaps: leave suffix out"}


def read_fields(body: Any, known: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of a request, with those that were not given; null is not given.

    Raises:
        Problem: 400, which names the field.
    """
    if not isinstance(body, dict):
        raise Problem(400, f"the body is {show(body)}: it must be an object")
    found = {name: field.default for name, field in known.items()}
    for name, value in body.items():
        if name in _REFUSED and name not in known:
            if value is not None:
                raise Problem(400, _REFUSED[name], name)
        elif name not in known:
            raise Problem(400, str(unknown("field", name, known)), name, "unknown_field")
        elif value is not None:
            try:
                known[name].check(name, value)
            except InputError as error:
                raise Problem(400, str(error), name) from error
            found[name] = value
    return found


def schema_of(known: Mapping[str, Field], required: tuple[str, ...] = ()) -> Schema:
    """The same fields in words of JSON Schema: each may be null where it may be left out."""
    properties = {}
    for name, field in known.items():
        properties[name] = field.schema
        if name not in required:
            properties[name] = {"anyOf": [field.schema, {"type": "null"}]}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
