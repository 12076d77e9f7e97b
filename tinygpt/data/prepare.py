"""Text to a folder of token files: tokenised on all cores, there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.checkpoints.download import fetch
from tinygpt.checkpoints.hub import cache_folder
from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.data.convert import Converter, codes, grouped, on_all_cores
from tinygpt.data.corpus import Source, TextSettings
from tinygpt.data.dataset import SPLITS, Dataset, Header, Split, tokens_folder
from tinygpt.data.find_files import SHAKESPEARE
from tinygpt.errors import InputError, reason, say, show, unknown
from tinygpt.storage import atomic_folder, digests_of_written, write_digests
from tinygpt.tokenizer.encoding import (
    NAMES,
    char_tokenizer,
    same_tokenizer,
    save_tokenizer,
)
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe
from tinygpt.tokenizer.tokenizer import END, Tokenizer

_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_KINDS = ("char", "bytes", "gpt2", "bpe:N")
_MOST_LOST = 0.01  # of a text's characters may be missing in a vocabulary that it did not teach
_LEARN_BYTES = 64 << 20  # of this much text, spread evenly, a BPE is learnt


def prepare(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path | Tokenizer,
    val: float = 0.1,
    field: str | None = None,
    special_tokens: bool | None = None,
    keep_crlf: bool = False,
    leave_out: Path | None = None,
) -> Header:
    """Turn text into a folder of token files that `Dataset.open` reads.

    The last part of the text is for validation: of plain text, from the first character that
    starts at or past the byte (1 - val) * size, and outside of a special token; of records, those
    that start there. Of several files, and of records, each is a document and ends with
    `<|endoftext|>` (for char, which has none, a line feed). A byte order mark is dropped.

    Args:
        source: a UTF-8 file; a folder of them, in the order of their paths, hidden ones left out; a
            pattern such as `texts/*.txt`; several of these; or the str "shakespeare", char-rnn's
            file, fetched once. It may be larger than memory.
        out: the folder to make. One that holds this very text prepared in this way is left as it
            is; any other that is not empty is refused.
        tokenizer: char, bytes, gpt2, or bpe:N to learn N ids from the training text (64 MiB of it);
            a text too short for N merges of what occurs twice gives fewer. Else a folder or a
            model's file that brings one (see `load_tokenizer`), or a tokenizer itself.
        val: the fraction for validation, 0 <= val < 1.
        field: the source is JSON lines, a JSON array or CSV, with the text under this key; under
            several, with commas between them, which are joined by line feeds.
        special_tokens: whether the spelling of a special token in the text means that token; None
            means it in documents, which it may separate, and not in a single text.
        keep_crlf: leave \\r\\n as it is; it is read as \\n otherwise.
        leave_out: a folder that is not looked into; None is `out`.
    Returns:
        the header of the folder.
    Raises:
        InputError: for an argument or text that cannot work, or when `out` cannot be written; then
            nothing is left behind.
    """
    reading = TextSettings(val, field, special_tokens, keep_crlf)
    name, given = _given(tokenizer)
    sources, out = _sources(source), Path(out)
    text = Source.find(sources, reading, leave_out or out)
    names, as_tokens = _special_tokens(name, given, text)
    settings = {"source": text.sha256, "tokenizer": name, "val": val, "field": field}
    settings |= {"special_tokens": as_tokens, "keep_crlf": keep_crlf}
    if existing := _existing(out, settings, given, text.has_crlf):
        return existing
    with atomic_folder(out, "; pass another -o") as folder:
        encoding = given or _learnt(name, text, names, as_tokens)
        splits, found = _write(folder, Converter(encoding, names, as_tokens), text)
        header = Header(
            vocab_size=encoding.n_vocab,
            splits=splits,
            special_tokens_found=found.total(),
            **settings,
        )
        with digests_of_written() as digests:
            save_tokenizer(encoding, folder)
            header.write(folder)
        write_digests(folder, digests)
        text.check_unchanged()
    if found:
        _say_found(found, as_tokens, encoding)
    return header


def _say_found(found: Counter[str], as_tokens: bool, tokenizer: Tokenizer) -> None:
    """Say how many special tokens stood in a text, and what was made of them."""
    names = ", ".join(show(name)[1:-1] for name, _ in found.most_common(3))
    how = (
        "read as tokens" if as_tokens else "read as plain text: --special-tokens makes tokens of it"
    )
    if tokenizer.name == "char":
        how = "read as plain text, since single characters are all that char has"
    say(f"{names} stands in the text {found.total():,} times, {how}")


def _sources(source: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """What to read, after it is fetched where it is a name."""
    sources = [source] if isinstance(source, str | Path) else [*source]
    if sources == [SHAKESPEARE]:
        if os.path.exists(SHAKESPEARE):
            say(f"{SHAKESPEARE} is the name of a text to fetch; ./{SHAKESPEARE} is what is here")
        path = cache_folder() / "data" / "shakespeare.txt"
        if not path.is_file():
            fetch(_SHAKESPEARE[0], path, _SHAKESPEARE[1])
        return [path]
    for each in sources:
        if tokens_folder(each):
            raise InputError(f"{each} holds prepared tokens: give it alone, to train or evaluate")
    return sources


def _special_tokens(kind: str, tokenizer: Tokenizer | None, text: Source) -> tuple[list[str], bool]:
    """The spellings that a text is searched for, and whether they are read as tokens."""
    asked = text.settings.special_tokens
    names = [END] if kind != "char" else []
    if tokenizer:
        names = [token.content for token in tokenizer.added if token.special]
    if names:
        return names, text.documents if asked is None else asked
    if asked:
        raise InputError(
            f"tokenizer {show(kind)} has no special tokens: pass --tokenizer with bytes, gpt2 or "
            "bpe:N, or leave --special-tokens out"
        )
    return [END], False


def _given(tokenizer: str | Path | Tokenizer) -> tuple[str, Tokenizer | None]:
    """What a header calls a tokenizer, and the tokenizer, None where the text is to teach it."""
    if not isinstance(tokenizer, str | Path):
        return f"{tokenizer.name} (given)", tokenizer
    if isinstance(tokenizer, str):
        if tokenizer == "char" or re.fullmatch(r"bpe:[0-9]{1,9}", tokenizer):
            return tokenizer, None
        if tokenizer in NAMES:
            return tokenizer, load_tokenizer(tokenizer)
    if not os.path.exists(tokenizer):
        raise unknown("tokenizer", str(tokenizer), (*_KINDS, "a folder or a model that has one"))
    return str(Path(tokenizer).absolute()), load_tokenizer(Path(tokenizer))


def _existing(
    out: Path, settings: dict[str, Any], given: Tokenizer | None, has_crlf: bool
) -> Header | None:
    """The header of a folder that was made with these settings; None where there is nothing."""
    try:
        if not os.path.lexists(out) or (out.is_dir() and not os.listdir(out)):
            return None
    except OSError as error:
        raise InputError(f"cannot read {out}: {reason(error)}; pass another -o") from error
    if not (out / "header.json").is_file():
        raise InputError(f"{out} is there and holds something else: pass another -o")
    data = Dataset.open(out)
    for name, value in settings.items():
        had = getattr(data.header, name)
        # A tokenizer that is given may be the same under another name.
        if name == "tokenizer" and given and same_tokenizer(data.tokenizer(), given):
            continue
        if name == "keep_crlf" and not has_crlf:
            continue
        if had != value or (name == "tokenizer" and given):
            fact = "other text" if name == "source" else f"{name} {show(had)}, not {show(value)}"
            raise InputError(f"{out} was prepared with {fact}: pass another -o, or remove it first")
    return data.header


def _learnt(kind: str, text: Source, names: list[str], as_tokens: bool) -> Tokenizer:
    """The tokenizer that a text teaches: its characters, or for `bpe:N` its most frequent pairs."""
    if kind == "char":
        seen = np.zeros(0x110000, bool)
        for _, piece, _ in text.pieces("alphabet", names, end="\n"):
            seen[codes(piece)] = True
        return char_tokenizer(map(chr, np.flatnonzero(seen)))
    learnt = (piece for is_val, piece, _ in text.pieces("words", names) if not is_val)
    every = max(1, -(-text.cut // _LEARN_BYTES))
    chosen = islice(learnt, 0, None, every)
    if as_tokens:
        chosen = (part for piece in chosen for part in piece.split(END))
    return bpe_tokenizer(train_bpe(chosen, int(kind.partition(":")[2])))


def _check_lost(lost: Counter[str], characters: int) -> None:
    """Say which characters a vocabulary lacks: a few are left out, of another alphabet none is."""
    if lost:
        names = ", ".join(f"{name!r} (U+{ord(name):04X})" for name, _ in lost.most_common(3))
        many = f"{lost.total():,} of {characters + lost.total():,} characters are not in the "
        many += f"tokenizer, such as {names}"
        if lost.total() > _MOST_LOST * characters:
            raise InputError(f"{many}: use another tokenizer, or a model that has them")
        say(f"{many}: they are left out")


def _write(
    folder: Path, converter: Converter, text: Source
) -> tuple[dict[str, Split], Counter[str]]:
    """Write both token files; their splits, and how often special tokens were spelt."""
    counts = {split: np.zeros(3, np.int64) for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    parts = grouped(text.pieces("tokens", converter.whole, converter.end_text))
    found, lost = Counter[str](), Counter[str]()
    with ExitStack() as stack:
        files = {s: stack.enter_context(open(folder / f"{s}.bin", "wb")) for s in SPLITS}
        for is_val, ids, counted, spelt, lacking in on_all_cores(converter, parts):
            split = SPLITS[is_val]
            files[split].write(ids)
            digests[split].update(ids)
            counts[split] += counted
            found.update(spelt)
            lost.update(lacking)
        _check_lost(lost, sum(int(count[1]) for count in counts.values()))
        for split, file in files.items():
            if not file.tell() and not (split == "val" and text.cut == text.size):
                raise InputError(f"no text is left for {split}: give more text or another --val")
            file.flush()
            os.fsync(file.fileno())
    return {s: Split(*map(int, counts[s]), digests[s].hexdigest()) for s in SPLITS}, found
