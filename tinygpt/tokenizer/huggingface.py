"""What Hugging Face's files say around a vocabulary, read as `transformers` reads it, and written.

Source: `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tinygpt.errors import CheckpointError, InputError, show
from tinygpt.storage import read_json, read_text
from tinygpt.tokenizer.tokenizer import END, AddedToken, Tokenizer
from tinygpt.tokenizer.vocabulary import from_merges

CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_DECODER = "added_tokens_decoder"
_SPLIT = "split_special_tokens"
_ROLES = tuple(f"{x}_token" for x in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
# GPT-2's own classes take only vocabulary and merges from tokenizer.json, the others all of it.
_GPT2 = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_CLASSES = (*_GPT2, "PreTrainedTokenizerFast", "TokenizersBackend")
# Code to run, and files elsewhere.
_NOT_KEPT = ("auto_map", "tokenizer_file", "name_or_path", "special_tokens_map_file", _DECODER)
ADVICE = "use another tokenizer"


def from_pair(vocab: Path, merges: Path) -> Tokenizer:
    """The tokenizer of a `vocab.json` and a `merges.txt`, with what other files beside them say.

    Raises:
        CheckpointError: when a file is damaged, or says what no vocabulary can be.
        InputError: when it is not of GPT-2's form.
    """
    lines = read_text(merges, most_bytes=4 << 20).replace("\r\n", "\n").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    config, listed = _beside(vocab.parent)
    return assemble(read_json(vocab), lines, config, listed, str(vocab.parent))


def from_tokenizers(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, as the library `tokenizers` writes it.

    Raises:
        CheckpointError: when a file is damaged, or says what no vocabulary can be.
        InputError: when it is not of GPT-2's form.
    """
    match read_json(path):
        case {
            "model": dict(model),
            "pre_tokenizer": dict(split),
            "added_tokens": list(added),
            **other,
        }:
            vocab, merges = model.get("vocab"), model.get("merges")
        case content:
            raise CheckpointError(
                f"{str(path)!r} holds {show(content)}: it must have a model, a pre_tokenizer and "
                "added_tokens; save the tokenizer again"
            )
    for name, value, usual in (
        ("model.type", model.get("type", "BPE"), "BPE"),
        ("normalizer", other.get("normalizer"), None),
        ("pre_tokenizer.type", split.get("type"), "ByteLevel"),
        ("pre_tokenizer.use_regex", split.get("use_regex", True), True),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix") or "", ""),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix") or "", ""),
        ("model.ignore_merges", model.get("ignore_merges") or False, False),
        ("model.dropout", model.get("dropout") or None, None),
    ):
        if value != usual:
            raise InputError(
                f"{str(path)!r}: {name} is {show(value)}, but only a tokenizer of GPT-2's form, "
                f"where it is {usual!r}, can be read; {ADVICE}"
            )
    config, listed = _beside(path.parent)
    own = [_token(token, str(path)) for token in added]
    if config.get("tokenizer_class") in _GPT2:
        if _DECODER not in config:
            listed |= {token.content: token for token in own}
    else:
        listed |= {token.content: token for token in own}
        config["add_prefix_space"] = split.get("add_prefix_space", False)
    around = _around(other.get("post_processor"), path)
    return assemble(vocab, merges, config, listed, str(path), around)


def _beside(folder: Path) -> tuple[dict[str, Any], dict[str, AddedToken]]:
    """What `tokenizer_config.json` and its forerunners say, and the added tokens they list."""

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    config, listed = read(CONFIG), {}
    if config.get("tokenizer_class") is None:  # then the model's file may name it
        kind = read("config.json").get("tokenizer_class")
        config |= {} if kind is None else {"tokenizer_class": kind}
    if (folder / _TEMPLATE).exists():
        config["chat_template"] = read_text(folder / _TEMPLATE)
    if _DECODER in config:
        return config, listed_in(config, str(folder / CONFIG))
    config |= read("special_tokens_map.json")
    special = set(_named(config, str(folder)))
    for content, number in read("added_tokens.json").items():
        flags = {"special": content in special, "normalized": content not in special}
        listed[content] = AddedToken(content, _id(number, content, str(folder)), **flags)
    return config, listed


def listed_in(config: Mapping[str, Any], source: str) -> dict[str, AddedToken]:
    """The added tokens that a `tokenizer_config.json` lists with their ids."""
    found = config.get(_DECODER, {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: {_DECODER} is {show(found)}: it must be an object")
    listed = {}
    for number, value in found.items():
        if not (isinstance(value, dict) and number.isascii() and number.isdecimal()):
            fact = f"{_DECODER} has {show(number)}: {show(value)}"
            raise CheckpointError(f"{source}: {fact}, which is no id of a token")
        token = _token(value | {"id": int(number[:12])}, source)
        listed[token.content] = token
    return listed


def assemble(
    vocab: Any,
    merges: Any,
    config: Mapping[str, Any],
    listed: Mapping[str, AddedToken],
    source: str,
    around: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Tokenizer:
    """A tokenizer of its parts.

    Args:
        vocab, merges: see `from_merges`.
        config: what `tokenizer_config.json` holds.
        listed: the added tokens whose ids are known. Others that `config` names have the ids that
            the vocabulary has for them, or the next ones.
        source: where it comes from, for an error.
        around: the ids before and after a text; None is as `config` says.
    Raises:
        CheckpointError: when the parts contradict each other.
        InputError: for a tokenizer of another class than GPT-2's.
    """
    kind = config.get("tokenizer_class")
    if kind not in _CLASSES:
        known = ", ".join(filter(None, _CLASSES))
        raise InputError(f"{source}: its tokenizer_class is {show(kind)}, not {known}; {ADVICE}")
    added, named = dict(listed), _named(config, source)
    if kind in _GPT2:  # these have names of their own
        for role in ("bos_token", "eos_token", "unk_token"):
            if role not in config and isinstance(vocab, dict) and END in vocab:
                named.setdefault(END, AddedToken(END, -1))
    ids = (
        {**vocab, **{token.content: token.id for token in listed.values()}}
        if isinstance(vocab, dict)
        else {}
    )
    following = 1 + max((number for number in ids.values() if isinstance(number, int)), default=-1)
    for content, token in named.items():
        if content in added:
            added[content] = replace(added[content], special=True)
            continue
        number = ids.get(content, following)
        following = max(following, number + 1)
        added[content] = replace(token, id=number, special=True)
    roles = {}
    for role in ("bos_token", "eos_token"):
        content = _content(config.get(role, END if kind in _GPT2 else None))
        roles[role[:3]] = added[content].id if content in added else None
    flags = {}
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token", _SPLIT):
        flags[name] = config.get(name) or False
        if not isinstance(flags[name], bool):
            raise CheckpointError(
                f"{source}: {name} is {show(flags[name])}: it must be true or false"
            )
    if around is None:
        around = tuple(
            (roles[role],) if flags[f"add_{role}_token"] and roles[role] is not None else ()
            for role in ("bos", "eos")
        )
    kept = {name: value for name, value in config.items() if name not in _NOT_KEPT}
    return from_merges(
        vocab, merges, source, tuple(added.values()), prefix_space=flags["add_prefix_space"],
        split_special=flags[_SPLIT], before=around[0], after=around[1], **roles,
        kept={CONFIG: kept} if kept else {},
    )  # fmt: skip


def config_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `tokenizer_config.json` is to hold, so that all of a tokenizer but its merges is there.

    Raises:
        InputError: where a text gets other ids around it than its begin and its end.
    """
    config = dict(tokenizer.kept.get(CONFIG, {}))
    spelled = {token.id: token.content for token in tokenizer.added}
    for role in (role for role in (*_ROLES, *config) if role.endswith("_token")):
        if (content := _content(config.get(role))) is not None:
            config[role] = content  # its flags stand with the added tokens
    for role, number, ids in (
        ("bos", tokenizer.bos, tokenizer.before),
        ("eos", tokenizer.eos, tokenizer.after),
    ):
        if spelled.get(number, END) != END:
            config[f"{role}_token"] = spelled[number]
        if ids not in ((), (number,)):
            raise InputError(
                f"tokenizer {tokenizer.name!r} puts ids {show(ids)} around a text, which "
                f"{CONFIG} cannot say: use another"
            )
        config.pop(f"add_{role}_token", None)
        if ids:
            config[f"add_{role}_token"] = True
    for name, holds in (
        ("add_prefix_space", tokenizer.prefix_space),
        (_SPLIT, tokenizer.split_special),
    ):
        config.pop(name, None)
        if holds:
            config[name] = True
    if config.get("tokenizer_class") not in _GPT2:  # GPT-2's own takes these for given
        config = {"bos_token": None, "eos_token": None, "unk_token": None, **config}
    config["tokenizer_class"] = "GPT2Tokenizer"
    config[_DECODER] = {}
    for token in sorted(tokenizer.added, key=lambda token: token.id):
        fields = asdict(token)
        config[_DECODER][str(fields.pop("id"))] = fields
    return config


def _named(config: Mapping[str, Any], source: str) -> dict[str, AddedToken]:
    """The special tokens that have a role, their ids not yet known."""
    roles = (*_ROLES, *(name for name in config if name.endswith("_token") and name not in _ROLES))
    values = [config.get(role) for role in roles]
    for name in _EXTRA:
        extra = config.get(name) or ()
        if not isinstance(extra, list | tuple | dict):
            raise CheckpointError(f"{source}: {name} is {show(extra)}: it must be a list")
        values += extra.values() if isinstance(extra, dict) else extra
    found: dict[str, AddedToken] = {}
    for value in values:
        if isinstance(value, str):
            found.setdefault(value, AddedToken(value, -1))
        elif isinstance(value, dict):
            token = _token({"special": True, **value, "id": -1}, source)
            found.setdefault(token.content, token)
    return found


def _content(value: Any) -> str | None:
    """The spelling of a token, which may be written as one or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _token(value: Any, source: str) -> AddedToken:
    match value:
        case {"content": str(content), "id": number}:
            flags = {name: value[name] for name in _FLAGS if name in value}
            special = flags.setdefault("special", False)
            flags.setdefault("normalized", not special)
            if all(isinstance(flag, bool) for flag in flags.values()):
                return AddedToken(content, _id(number, value, source), **flags)
    raise CheckpointError(
        f"{source!r}: added token {show(value)} must have a content, an id, and flags that are "
        "true or false; save the tokenizer again"
    )


def _id(number: Any, token: Any, source: str) -> int:
    if type(number) is not int:
        raise CheckpointError(f"{source!r}: added token {show(token)} has id {show(number)}")
    return number


def _around(processor: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a `post_processor` puts before and after a text."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return (), ()
        case {"type": "Sequence", "processors": list(parts)}:
            before, after = (), ()
            for part in parts:
                if isinstance(part, dict) and part.get("type") == "Sequence":
                    break  # of any depth
                first, last = _around(part, path)
                before, after = first + before, after + last
            else:
                return before, after
        case {"type": "TemplateProcessing", "single": list(single), "special_tokens": dict(tokens)}:
            sides: list[tuple[int, ...]] = [()]
            for part in single:
                match part:
                    case {"Sequence": {"id": "A"}} if len(sides) == 1:
                        sides.append(())
                        continue
                    case {"SpecialToken": {"id": str(name)}}:
                        match tokens.get(name):
                            case {"ids": [*ids]} if all(type(number) is int for number in ids):
                                sides[-1] += tuple(ids)
                                continue
                break
            else:
                if len(sides) == 2:
                    return sides[0], sides[1]
    raise InputError(f"{str(path)!r}: its post_processor is {show(processor)}; {ADVICE}")
