"""The fields of the requests to /study: what each may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinygpt.errors import InputError, check_int, show
from tinygpt.server.fields import COMPLETION, Field, Schema, whole


def _prompt(name: str, value: Any) -> None:
    if isinstance(value, list):
        if not value or not all(type(each) is int for each in value):
            raise InputError(f"{name} is {show(value)}: it must be a text, or a list of ids")
    elif not isinstance(value, str):
        raise InputError(f"{name} is {show(value)}: it must be a text, or a list of ids")


def _place(name: str, value: Any) -> None:
    check_int(name, value, 0)


def _pairs(name: str, value: Any) -> None:
    rows = value if isinstance(value, list) else [None]
    if not all(isinstance(e, list) and len(e) == 2 and _are_ids(e) for e in rows):
        raise InputError(f"{name} is {show(value)}: it must be a list of [block, head]")


def _numbers(name: str, value: Any) -> None:
    if not isinstance(value, list) or not _are_ids(value):
        raise InputError(f"{name} is {show(value)}: it must be a list of whole numbers")


def _are_ids(values: list[Any]) -> bool:
    return all(type(each) is int for each in values)


_INTEGER: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _INTEGER}
_PROMPT = Field(
    _prompt,
    {"anyOf": [{"type": "string"}, {**_IDS, "minItems": 1}], "description": "a text, or its ids"},
    "",
)
_MODEL = {"prompt": _PROMPT, "model": COMPLETION["model"]}


def _integer(words: str) -> Field:
    return Field(_place, {**_INTEGER, "description": words})


_SETTINGS = {
    name: COMPLETION[name]
    for name in (
        "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias",
    )
}  # fmt: skip
CONTINUE = "/study/continue"
# The fields of each address; a text is given to all of them.
STUDIES: dict[str, dict[str, Field]] = {
    "/study/tokens": {**_MODEL},
    "/study/attention": {
        **_MODEL, "block": _integer("which block"), "head": _integer("which head of it"),
    },
    "/study/lens": {**_MODEL, "index": _integer("behind which token; the last if left out")},
    "/study/attribute": {
        **_MODEL,
        "index": _integer("behind which token; the last if left out"),
        "token": _integer("the id whose logit it is; the likeliest if left out"),
        "against": _integer("an id whose logit is taken away"),
    },
    CONTINUE: {
        **_MODEL, **_SETTINGS,
        "max_tokens": COMPLETION["max_tokens"],
        "echo": COMPLETION["echo"],
        "top": replace(COMPLETION["logprobs"], default=10),
        "written": whole(
            0, 0, 2**31 - 1, "how many of the prompt's last tokens the penalties take for written"
        ),
        "heads": Field(_pairs, {"type": "array", "items": {**_IDS, "minItems": 2, "maxItems": 2},
                                "description": "pairs of block and head to leave out"}),
        "blocks": Field(_numbers, {**_IDS, "description": "blocks to leave out"}),
    },
}  # fmt: skip
