"""What the server answers, in words of OpenAPI: made of the same fields that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinygpt import __version__
from tinygpt.server.fields import COMPLETION, Field, Schema, schema_of


def _object(properties: Mapping[str, Schema], may_be_null: bool = False) -> Schema:
    """An object that has just these."""
    kind = ["object", "null"] if may_be_null else "object"
    return {"type": kind, "properties": dict(properties), "required": list(properties)}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_INTEGER: Schema = {"type": "integer"}
_STRING: Schema = {"type": "string"}
_PERHAPS: Schema = {"type": ["string", "null"]}
_ERROR = _object(
    {"error": _object({"message": _STRING, "type": _STRING, "param": _PERHAPS, "code": _PERHAPS})}
)
_USAGE = _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _INTEGER))
_LOGPROBS = _object(
    {
        "tokens": _array(_STRING),
        "token_logprobs": _array({"type": ["number", "null"]}),
        "top_logprobs": _array({"type": ["object", "null"]}),
        "text_offset": _array(_INTEGER),
    },
    may_be_null=True,
)
_CHOICE = _object(
    {
        "index": _INTEGER,
        "text": _STRING,
        "logprobs": _LOGPROBS,
        "finish_reason": {"enum": ["stop", "length", None]},
    }
)
_COMPLETION = _object(
    {
        "id": _STRING,
        "object": {"const": "text_completion"},
        "created": _INTEGER,
        "model": _STRING,
        "choices": _array(_CHOICE),
        "usage": _USAGE,
    }
)
_MODEL = _object(
    {
        "id": _STRING,
        "object": {"const": "model"},
        "created": _INTEGER,
        "owned_by": _STRING,
        "max_model_len": _INTEGER,
    }
)
_MODELS = _object({"object": {"const": "list"}, "data": _array(_MODEL)})
_ANY: Schema = {"type": "object"}


def openapi(more: Mapping[str, Mapping[str, Field]], keyed: bool) -> dict[str, Any]:
    """The document of `/openapi.json`.

    Args:
        more: the addresses that take fields, besides `/v1/completions`.
        keyed: whether a key is asked for.
    """
    named = {"in": "path", "name": "name", "required": True, "schema": {"type": "string"}}
    paths: dict[str, Any] = {
        "/health": {"get": _operation("whether texts can be continued", _ANY)},
        "/metrics": {"get": _operation("what was counted", {"type": "string"}, "text/plain")},
        "/v1/models": {"get": _operation("the one model", _MODELS)},
        "/v1/models/{name}": {
            "get": {**_operation("the model of a name", _MODEL), "parameters": [named]}
        },
        "/v1/completions": {
            "post": _operation("texts continued", _COMPLETION, fields=COMPLETION, events=True)
        },
        "/tokenizer_info": {"get": _operation("about the tokenizer", _ANY)},
        "/study/model": {"get": _operation("about the model", _ANY)},
    }
    for path, fields in more.items():
        events = path == "/study/continue"
        operation = _operation(f"what {path} says", _ANY, fields=fields, events=events)
        paths[path] = {"post": operation}
    scheme = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "tinygpt", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": scheme} if keyed else {},
        },
        "security": [{"key": []}] if keyed else [],
    }


def _operation(
    summary: str,
    answer: Schema,
    kind: str = "application/json",
    fields: Mapping[str, Field] | None = None,
    events: bool = False,
) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": answer}}
    if events:
        event = {"type": "object", "properties": {"data": {"type": "string"}}}
        content["text/event-stream"] = {"schema": event}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "as asked", "content": content},
            "default": {"description": "why it cannot be", "content": error},
        },
    }
    if fields is not None:
        required = {"application/json": {"schema": schema_of(fields)}}
        found["requestBody"] = {"required": True, "content": required}
    return found
