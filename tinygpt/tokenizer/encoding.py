"""Text to token ids and back through tiktoken: vocabularies by name, by folder, by character."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.errors import InputError, reason, show
from tinygpt.storage import read_json, read_text, write_text
from tinygpt.tokenizer.vocabulary import (
    END,
    SURROGATE,
    find_merges,
    from_merges,
    from_tokenizers,
    spell,
)

if TYPE_CHECKING:  # imported only where text is handled, which is rare
    from tiktoken import Encoding

NAMES = ("gpt2", "bytes")
_MAX_MERGES_BYTES = 4 << 20  # GPT-2's are 0.46 MB
_OWN = "tinygpt_tokenizer.json"
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_HUGGING_FACE = "tokenizer.json"
FILES = (_OWN, *(" and ".join(pair) for pair in _PAIRS), _HUGGING_FACE)
_USUAL = {50257: "gpt2", 50304: "gpt2", 257: "bytes"}  # nanoGPT rounds up to a multiple of 64
_EACH = r"(?s:.)"  # a split pattern: every character by itself

# GPT-2's pattern takes white space, less its last character, as one piece, but backtracks through
# it: a million of them overflow tiktoken's stack. Cut just there, the pieces are the same and
# nothing backtracks. (Python counts U+001C to U+001F as white space, tiktoken does not.)
_LONG_SPACE = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{9999,}+(?=[\S\x1c-\x1f])")


def named_tokenizer(name: str) -> Encoding:
    """The tokenizer of one of NAMES.

    Raises:
        InputError: when gpt2 is neither in tiktoken's cache nor can be downloaded.
    """
    import tiktoken

    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(
            name, pat_str=_EACH, mergeable_ranks=ranks, special_tokens={END: 256}
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # a failed download is an OSError
        raise InputError(
            f"cannot download tokenizer {name!r} (no network? {type(error).__name__}): set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or pass --tokenizer with bytes or with a "
            "folder that has vocab.json and merges.txt"
        ) from error


def folder_has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any of the files that `folder_tokenizer` reads.

    Raises:
        InputError: when the folder cannot be read.
    """
    pairs = (name for pair in _PAIRS for name in pair)
    return not _names_in(folder).isdisjoint((_OWN, _HUGGING_FACE, *pairs))


def folder_tokenizer(folder: Path, vocab_size: int | None = None) -> Encoding:
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
    for vocab, merges in _PAIRS:
        if {vocab, merges} <= present:
            lines = read_text(folder / merges, _MAX_MERGES_BYTES).split("\n")
            lines = lines[1:] if lines[0].startswith("#version") else lines
            return from_merges(read_json(folder / vocab), [*filter(None, lines)], str(folder))
    if _HUGGING_FACE in present:
        return from_tokenizers(folder / _HUGGING_FACE)
    if vocab_size in _USUAL and not folder_has_tokenizer(folder):
        return named_tokenizer(_USUAL[vocab_size])
    raise InputError(
        f"no tokenizer in folder {str(folder)!r}: it needs {' or '.join(FILES)}; "
        f"add them, or pass --tokenizer with {', '.join(NAMES)} or another folder"
    )


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {reason(error)}; pass another folder") from error


def char_tokenizer(characters: Iterable[str]) -> Encoding:
    """A tokenizer with one id per distinct character, in sorted order, and no special tokens.

    Args:
        characters: a text, or pieces of one.
    Raises:
        InputError: when there is no character, or one is not valid Unicode.
    """
    from tiktoken import Encoding

    distinct = sorted({character for piece in characters for character in piece})
    if not distinct:
        raise InputError("there are 0 characters to make a tokenizer of: give a text with some")
    ranks = {_utf8(character): number for number, character in enumerate(distinct)}
    return Encoding("char", pat_str=_EACH, mergeable_ranks=ranks, special_tokens={})


def save_tokenizer(tokenizer: Encoding, folder: str | Path) -> None:
    """Write what `folder_tokenizer(folder)` reads back equal.

    All but a character-level one also get the files that other GPT-2 implementations read.

    Raises:
        InputError: when a file cannot be written, or the tokenizer is not of GPT-2's form.
    """
    folder, name, files = Path(folder), tokenizer.name, {}
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    if name == "char":
        characters = b"".join(sorted(ranks, key=ranks.__getitem__)).decode()
        files[_OWN] = json.dumps({"kind": name, "characters": characters})
    else:
        merges = find_merges(ranks, name)
        vocab = {spell(token): number for token, number in ranks.items()} | special
        files["vocab.json"] = json.dumps(vocab, ensure_ascii=False)
        files["merges.txt"] = "\n".join(("#version: 0.2", *map(" ".join, merges), ""))
        added = {number: {"content": token, "special": True} for token, number in special.items()}
        files["tokenizer_config.json"] = json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added}
        )
        if name in NAMES:
            files[_OWN] = json.dumps({"kind": name})
        elif not same_tokenizer(from_merges(vocab, merges, name), tokenizer):
            raise InputError(
                f"tokenizer {name!r} has a split pattern or special tokens that vocab.json and "
                "merges.txt cannot hold: use gpt2, bytes or a byte-level BPE of GPT-2's form"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_text(folder / file, content)
        if _OWN not in files:  # one left by an earlier save would be read first
            (folder / _OWN).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {reason(error)}; pass another folder") from error


def same_tokenizer(one: Encoding, other: Encoding) -> bool:
    """Whether two tokenizers give every text the same ids, whatever they are called."""
    what_decides = ["_mergeable_ranks", "_special_tokens"]
    if any(len(token) > 1 for token in one._mergeable_ranks):  # else nothing is merged in a word
        what_decides.append("_pat_str")
    return all(getattr(one, part) == getattr(other, part) for part in what_decides)


def encode(tokenizer: Encoding, text: str, special: bool = False) -> list[int]:
    """The ids of a text.

    Args:
        special: whether the spelling of a special token means that token; if not, it is text.
    Raises:
        InputError: for a character the vocabulary lacks, or one that is not valid Unicode.
    """
    names = sorted(tokenizer.special_tokens_set, key=len, reverse=True) if special else []
    pattern = "|".join(map(re.escape, names)) or "(?!)"  # which matches nowhere
    ranks, ids = tokenizer._mergeable_ranks, []
    for number, part in enumerate(re.split(f"({pattern})", text)):
        if number % 2:  # every second part is a special token, at which the text was split
            ids.append(tokenizer.encode_single_token(part))
            continue
        for character in set(part):
            data = _utf8(character)
            if data not in ranks and not all(bytes([byte]) in ranks for byte in data):
                raise InputError(  # tiktoken would panic
                    f"character {character!r} (U+{ord(character):04X}) is not in tokenizer "
                    f"{tokenizer.name!r}: take it out, or use a model with another tokenizer"
                )
        cuts = [0, *(space.end() - 1 for space in _LONG_SPACE.finditer(part)), len(part)]
        for start, end in pairwise(cuts):
            ids += tokenizer.encode_ordinary(part[start:end])
    return ids


def end_token(tokenizer: Encoding) -> int | None:
    """The id of `<|endoftext|>`, None where the tokenizer has none."""
    return tokenizer._special_tokens.get(END)


def decode(tokenizer: Encoding, ids: Iterable[int]) -> str:
    """The text of some ids: what a `TextStream` gives, in one piece."""
    stream = TextStream(tokenizer)
    return "".join(map(stream.add, ids)) + stream.end()


class TextStream:
    """The text of ids that are added one by one, in pieces that never split a character.

    Attributes:
        stopped: whether a stop text was complete. The text ends just before it.
    """

    def __init__(self, tokenizer: Encoding, stop: str | Sequence[str] = ()) -> None:
        """
        Args:
            stop: texts of which the first to be complete ends the text.
        Raises:
            InputError: for an empty stop text.
        """
        self.tokenizer = tokenizer
        self.stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stops:
            raise InputError("stop text '' is empty: give at least one character, or leave it out")
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # what may yet become a stop text

    def add(self, token: int) -> str:
        """What the next id adds to the text, perhaps nothing yet.

        Args:
            token: one the tokenizer lacks (a padded vocabulary) gives U+FFFD.
        """
        try:
            data = self.tokenizer.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            data = b"\xff"  # a byte that UTF-8 never has: the decoder makes it U+FFFD
        return self._until_stop(self._decoder.decode(data))

    def end(self) -> str:
        """What was held back, when no more ids come."""
        text = self._until_stop(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.index(stop) + len(stop), text.index(stop))
                 for stop in self.stops if stop in text]  # fmt: skip
        if found:  # the first to end decides, however the ids divide the text
            self.stopped = True
            return text[: min(found)[1]]
        starts = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        keep = len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)
        self._held = text[keep:]
        return text[:keep]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{show(text)} has half of a surrogate pair, which is not valid Unicode: take it out"
        ) from None


def _from_own(path: Path) -> Encoding:
    match read_json(path):
        case {"kind": "gpt2" | "bytes" as kind}:
            return named_tokenizer(kind)
        case {"kind": "char", "characters": str(text)} if (
            text and list(text) == sorted(set(text)) and not SURROGATE.search(text)
        ):
            return char_tokenizer(text)
        case content:
            raise InputError(
                f"{str(path)!r} holds {show(content)}: it must be of kind gpt2, bytes or char, "
                "char with distinct sorted characters; save the tokenizer again"
            )
