"""POST /v1/chat/completions: messages made one prompt by a template, and answers as messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt.errors import InputError, one_line, reason, show
from tinygpt.server.choice import Piece, special_texts
from tinygpt.server.completions import Completion, Limits
from tinygpt.server.fields import COMPLETION, Field, check_text, whole
from tinygpt.server.problems import Problem
from tinygpt.storage import read_text
from tinygpt.writer import Writer

_ROLES = ("system", "user", "assistant")


def _messages(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name} is {show(value)}: it must be a list of messages")
    for message in value:
        fields = {"role", "content"}
        if not isinstance(message, dict) or set(message) - {"name"} != fields:
            raise InputError(f"{name} has {show(message)}: a message has a role and a content")
        if message.get("name") is not None:
            check_text("name", message["name"])
        if message["role"] not in _ROLES:
            raise InputError(
                f"{name} has the role {show(message['role'])}: it must be one of "
                f"{', '.join(_ROLES)}"
            )
        if _text_of(message["content"]) is None:
            raise InputError(
                f"{name} has {show(message['content'])}: a content is a text, or parts that are"
            )


def _given(message: dict[str, Any]) -> dict[str, Any]:
    """What a message has; null is not given."""
    return {name: value for name, value in message.items() if value is not None}


def _text_of(content: Any) -> str | None:
    """The text of a content: itself, or its parts, as some clients send it; None of all else."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) and content else [None]
    known = all(
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in parts
    )
    return "".join(part["text"] for part in parts) if known else None


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_PARTS = {"type": "array", "items": _PART, "minItems": 1}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(_ROLES)},
        "content": {"anyOf": [{"type": "string"}, _PARTS]},
        "name": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
_WITHOUT = {"prompt", "echo", "logprobs", "best_of"}
CHAT: dict[str, Field] = {
    "messages": Field(_messages, {"type": "array", "items": _MESSAGE, "minItems": 1}),
    **{name: field for name, field in COMPLETION.items() if name not in _WITHOUT},
    "max_completion_tokens": whole(None, 0, 2**31 - 1, "the same as max_tokens"),
}


class Template:
    """What makes one text of messages: a template of Jinja, as models bring it along."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: when it cannot be read, or is none.
        """
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise InputError(
                "--chat-template needs jinja2: pip install 'tinygpt[serve]'"
            ) from error
        self._failed: Any = jinja2.TemplateError
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = self._refuse
        try:
            self.source = read_text(path)
            self._template = environment.from_string(self.source)
        except OSError as error:
            raise InputError(f"--chat-template {path}: {reason(error)}") from error
        except jinja2.TemplateError as error:
            raise InputError(f"--chat-template {path}: {one_line(str(error))}") from error

    def _refuse(self, message: object) -> None:
        raise self._failed(str(message))

    def text(self, messages: list[dict[str, str]], writer: Writer) -> str:
        """The prompt that messages come to.

        Raises:
            Problem: when the template refuses them.
        """
        tokens = {name: text or "" for name, text in special_texts(writer.tokenizer).items()}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **tokens)
        except Exception as error:  # of the template's own: it can do anything, and fail at it
            message = f"the chat template refuses these messages: {one_line(str(error), 300)}"
            raise Problem(400, message, "messages", "template") from error


class Chat(Completion):
    """One request for the next message."""

    fields = CHAT
    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(
        self, body: Any, writer: Writer, name: str, limits: Limits, template: Template
    ) -> None:
        """
        Raises:
            Problem: for what cannot be answered.
        """
        self._template = template
        super().__init__(body, writer, name, limits)
        self._begun: set[int] = set()

    def prompt_of(self, asked: dict[str, Any]) -> str:
        """What is to be continued."""
        if asked["messages"] is None:
            raise Problem(400, "messages is missing: it must be a list of messages", "messages")
        if asked["max_tokens"] is None:
            asked["max_tokens"] = asked["max_completion_tokens"]
        messages = [
            {**_given(each), "content": _text_of(each["content"])} for each in asked["messages"]
        ]
        return self._template.text(messages, self.writer)

    def choice_of(self, index: int, piece: Piece, finish: str | None) -> dict[str, Any]:
        """One of the field `choices`: a message, or what is to be added to it."""
        if not self.stream:
            message = {"role": "assistant", "content": piece.text}
            return {"index": index, "message": message, "finish_reason": finish}
        delta = {"content": piece.text} if piece.text else {}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": piece.text}
        return {"index": index, "delta": delta, "finish_reason": finish}
