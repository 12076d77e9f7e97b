"""What each small file of a model must hold at least: a server's excuse is not taken for it.

A login, a proxy or a mirror answers in JSON or in plain words as often as with a page of the web.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinygpt.checkpoints.model_files import ADAPTER_CONFIG
from tinygpt.errors import CheckpointError, show
from tinygpt.storage import read_json, read_text

# What servers call the parts of an excuse: an object of these alone, with one of the first, is one.
_EXCUSE = {"error", "errors", "message", "msg", "detail", "reason", "status", "statuscode", "code"}
_AROUND = {
    "error_code", "error_description", "status_code", "details", "title", "type", "instance", "ok",
    "success", "path", "url", "timestamp", "request_id", "requestid", "documentation_url",
}  # fmt: skip
_SHAPE = {
    "n_layer", "n_head", "n_embd", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads",
}  # fmt: skip


def _is_config(found: dict[str, Any]) -> bool:
    return isinstance(found.get("model_type"), str) or any(
        type(found.get(name)) is int for name in _SHAPE
    )


def _are_ids(found: dict[str, Any]) -> bool:
    return all(type(number) is int for number in found.values())


# The name of a JSON file -> whether an object can be its content, and what that must have.
_OBJECTS: dict[str, tuple[Callable[[dict[str, Any]], bool], str]] = {
    "config.json": (_is_config, "a model_type, or a model's sizes"),
    ADAPTER_CONFIG: (lambda found: bool({"peft_type", "r"} & found.keys()), "a peft_type or an r"),
    "vocab.json": (
        lambda found: bool(found) and _are_ids(found),
        "tokens with a whole number each",
    ),
    "added_tokens.json": (_are_ids, "tokens with a whole number each"),
    "tokenizer.json": (lambda found: isinstance(found.get("model"), dict), "a model"),
}


def check(path: Path) -> None:
    """Refuse a file that has its form, and cannot be what its name says.

    Raises:
        CheckpointError: for that, and for one that cannot be read.
    """
    if path.suffix == ".json":
        found = read_json(path)
        fits, needed = _OBJECTS.get(path.name, (lambda _: True, "settings"))
        names = {name.lower() for name in found}
        if not fits(found) or (names & _EXCUSE and names <= _EXCUSE | _AROUND):
            raise CheckpointError(f"it must have {needed}, but is {show(found)}")
        return
    text = read_text(path)
    if path.name == "merges.txt":
        _check_merges(text, path.with_name("vocab.json"))
    elif path.suffix == ".jinja" and "{{" not in text and "{%" not in text:
        raise CheckpointError(f"it must have {{{{ or {{% as a template has, but is {show(text)}")


def _check_merges(text: str, vocab: Path) -> None:
    """Refuse what are no merges: two tokens in each line, the first of them a token together."""
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    merges = [line for line in lines if not line.startswith("#version")]
    for line in merges:
        if line.count(" ") != 1 or " " in (line[0], line[-1]):
            raise CheckpointError(f"it must have two tokens in each line, but one is {show(line)}")
    if merges and vocab.is_file() and merges[0].replace(" ", "") not in read_json(vocab):
        fact = f"but vocab.json does not have the first, {show(merges[0])}"
        raise CheckpointError(f"its merges must make tokens of the vocabulary, {fact}")
