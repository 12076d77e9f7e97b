"""Text to token ids and back through tiktoken: vocabularies by name, by folder, by character."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.errors import InputError, reason, show
from tinygpt.storage import read_json, write_text
from tinygpt.tokenizer import huggingface
from tinygpt.tokenizer.tokenizer import END, AddedToken, Tokenizer, utf8
from tinygpt.tokenizer.vocabulary import SURROGATE, find_merges, spell

if TYPE_CHECKING:  # imported only where text is handled, which is rare
    from tiktoken import Encoding

NAMES = ("gpt2", "bytes")
_OWN = "tinygpt_tokenizer.json"
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_HUGGING_FACE = "tokenizer.json"
# nanoGPT's `meta.pkl` is read by `checkpoints`, where the reader of pickles is.
FILES = (_OWN, *(" and ".join(pair) for pair in _PAIRS), _HUGGING_FACE, "meta.pkl")
_USUAL = {50257: "gpt2", 50304: "gpt2", 257: "bytes"}  # nanoGPT rounds up to a multiple of 64
_EACH = r"(?s:.)"  # a split pattern: every character by itself

# Files that others have, and what they hold.
_FOREIGN = {
    "vocab.txt": "a WordPiece vocabulary",
    **dict.fromkeys(
        ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model"),
        "a SentencePiece model",
    ),
}


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of one of NAMES.

    Raises:
        InputError: when gpt2 is neither in tiktoken's cache nor can be downloaded.
    """
    import tiktoken

    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding(
            name, pat_str=_EACH, mergeable_ranks=ranks, special_tokens={END: 256}
        )
    else:
        encoding = _gpt2()
    end = encoding.eot_token
    return Tokenizer(encoding, (AddedToken(END, end),), bos=end, eos=end)


def _gpt2() -> Encoding:
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # a failed download is an OSError
        raise InputError(
            f"cannot download tokenizer 'gpt2' (no network? {type(error).__name__}): set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or pass --tokenizer with bytes or with a "
            "folder that has vocab.json and merges.txt"
        ) from error


def folder_has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any of the files that `folder_tokenizer` reads.

    Raises:
        InputError: when the folder cannot be read.
    """
    present = _names_in(folder)
    halves = {name for pair in _PAIRS for name in pair}
    return bool(present & {_OWN, _HUGGING_FACE, *halves} or _renamed(present))


def folder_tokenizer(folder: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer whose files are in a folder.

    Args:
        vocab_size: how many ids the model knows. Where the folder has no tokenizer, 50257 and
            nanoGPT's 50304 mean `gpt2`, and 257 `bytes`.
    Raises:
        InputError: when there is none, or a file that cannot be used.
    """
    present = _names_in(folder)
    if _OWN in present:
        return _from_own(folder / _OWN)
    if _HUGGING_FACE in present:
        return huggingface.from_tokenizers(folder / _HUGGING_FACE)
    usual = [pair for pair in _PAIRS if present.issuperset(pair)]
    found = usual[:1] or _renamed(present)
    if len(found) > 1:
        names = ", ".join(pair[0] for pair in found)
        raise InputError(f"{str(folder)!r} has several tokenizers: pass --tokenizer with {names}")
    if found:
        return file_tokenizer(folder / found[0][0])
    has_foreign = [(name, what) for name, what in _FOREIGN.items() if name in present]
    if vocab_size in _USUAL and not has_foreign and not folder_has_tokenizer(folder):
        return named_tokenizer(_USUAL[vocab_size])
    if has_foreign:
        (name, what), *_ = has_foreign
        raise InputError(
            f"{str(folder / name)!r} is {what}, and only a byte-level BPE of GPT-2's form can be "
            f"read; {huggingface.ADVICE}"
        )
    raise InputError(
        f"no tokenizer in folder {str(folder)!r}: it needs {' or '.join(FILES)}; add them, "
        f"or pass --tokenizer with {', '.join(NAMES)} or another folder"
    )


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file's name says that it is one that `file_tokenizer` reads."""
    return path.name != _OWN and bool(_renamed({path.name}) or _other_half(path.name))


def file_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a vocabulary with its merges beside it."""
    if half := _other_half(path.name):
        return huggingface.from_pair(path, path.with_name(half))
    return huggingface.from_tokenizers(path)


def _other_half(vocab: str) -> str:
    """The name of the merges that belong to a vocabulary of that name; "" for any other file."""
    for name, merges in _PAIRS:
        if vocab.endswith(name):
            return vocab.removesuffix(name) + merges
    return ""


def _renamed(present: set[str]) -> list[tuple[str, ...]]:
    """The tokenizers that are there under names with something before the usual ones."""
    whole = [(name,) for name in present if name.endswith(_HUGGING_FACE) and name != _OWN]
    pairs = [(name, half) for name in present if (half := _other_half(name)) in present]
    return sorted([*whole, *pairs])


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {reason(error)}; pass another folder") from error


def ids_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer for a model whose own cannot be read: its text is the ids, as numbers."""
    from tiktoken import Encoding

    ranks = {f" {number}".encode(): number for number in range(vocab_size)}
    return Tokenizer(Encoding("ids", pat_str=r" \d+", mergeable_ranks=ranks, special_tokens={}))


def char_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """A tokenizer with one id per distinct character, in sorted order, and no special tokens.

    Args:
        characters: a text, or pieces of one.
    Raises:
        InputError: when there is no character, or one is not valid Unicode.
    """
    return alphabet_tokenizer(sorted({character for piece in characters for character in piece}))


def alphabet_tokenizer(characters: Sequence[str]) -> Tokenizer:
    """A tokenizer whose ids are the places of characters in a list of distinct ones.

    Raises:
        InputError: as from `char_tokenizer`.
    """
    from tiktoken import Encoding

    if not characters:
        raise InputError("there are 0 characters to make a tokenizer of: give a text with some")
    ranks = {utf8(character): number for number, character in enumerate(characters)}
    encoding = Encoding("char", pat_str=_EACH, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(encoding)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write what `folder_tokenizer(folder)` reads back equal.

    All but a character-level one also get the files that other GPT-2 implementations read.

    Raises:
        InputError: when a file cannot be written, or the tokenizer is not of GPT-2's form.
    """
    folder, name, ranks = Path(folder), tokenizer.name, tokenizer.ranks
    files: dict[str, str] = {}
    if name == "char":
        characters = b"".join(sorted(ranks, key=ranks.__getitem__)).decode()
        files[_OWN] = json.dumps({"kind": name, "characters": characters})
    else:
        merges = find_merges(ranks, name)
        vocab = {spell(token): number for token, number in ranks.items()} | tokenizer.others
        config = huggingface.config_of(tokenizer)
        files["vocab.json"] = json.dumps(vocab, ensure_ascii=False)
        files["merges.txt"] = "\n".join(("#version: 0.2", *map(" ".join, merges), ""))
        files[huggingface.CONFIG] = json.dumps(config)
        listed = huggingface.listed_in(config, name)
        if name in NAMES and same_tokenizer(tokenizer, named_tokenizer(name)):
            files[_OWN] = json.dumps({"kind": name})
        elif not same_tokenizer(
            huggingface.assemble(vocab, merges, config, listed, name), tokenizer
        ):
            raise InputError(
                f"tokenizer {name!r} has a split pattern or special tokens that vocab.json and "
                "merges.txt cannot hold: use gpt2, bytes or a byte-level BPE of GPT-2's form"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_text(folder / file, content)
        for file in {_OWN, _HUGGING_FACE} - files.keys():  # left by another, read before ours
            (folder / file).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {reason(error)}; pass another folder") from error


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every text the same ids, whatever they are called."""
    return _what_decides(one) == _what_decides(other)


def _what_decides(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """What of a tokenizer can be seen in the ids of a text."""
    ranks, added = tokenizer.ranks, tokenizer.added
    merges = any(len(token) > 1 for token in ranks)  # else nothing is merged in a word
    pattern = tokenizer.encoding._pat_str if merges else ""
    if len({token.normalized for token in added}) == 1:  # then none is looked for before another
        added = tuple(replace(token, normalized=False) for token in added)
    around = tokenizer.prefix_space, tokenizer.split_special, tokenizer.before, tokenizer.after
    return pattern, ranks, {*added}, around


def encode(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """The ids of a part of a text, as training sees it: see `Tokenizer.encode` for a prompt.

    Args:
        special: whether the spelling of a special token means that token; if not, it is text.
    Raises:
        InputError: for a character the vocabulary lacks, or one that is not valid Unicode.
    """
    return tokenizer.encode(text, special, whole=False)


def end_token(tokenizer: Tokenizer) -> int | None:
    """The id that ends a text, `<|endoftext|>` in GPT-2; None where the tokenizer has none."""
    return next(iter(tokenizer.ends), tokenizer.eos)


def _from_own(path: Path) -> Tokenizer:
    match read_json(path):
        case {"kind": "gpt2" | "bytes" as kind}:
            return named_tokenizer(kind)
        case {"kind": "char", "characters": str(text)} if (
            text and len(text) == len(set(text)) and not SURROGATE.search(text)
        ):
            return alphabet_tokenizer(text)
        case content:
            raise InputError(
                f"{str(path)!r} holds {show(content)}: it must be of kind gpt2, bytes or char, "
                "char with distinct characters; save the tokenizer again"
            )
