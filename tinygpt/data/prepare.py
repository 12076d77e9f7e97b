"""Text to a folder of token files: tokenised on all cores, there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.checkpoints.download import fetch
from tinygpt.checkpoints.hub import cache_folder
from tinygpt.checkpoints.load_tokenizer import load_tokenizer
from tinygpt.data.corpus import PIECE_BYTES, Piece, Source
from tinygpt.data.dataset import SPLITS, Dataset, Header, Split, ids_dtype
from tinygpt.errors import InputError, check_float, reason, show, unknown
from tinygpt.storage import atomic_folder
from tinygpt.tokenizer.encoding import (
    NAMES,
    char_tokenizer,
    encode,
    end_token,
    same_tokenizer,
    save_tokenizer,
)
from tinygpt.tokenizer.learn_bpe import bpe_tokenizer, train_bpe
from tinygpt.tokenizer.tokenizer import Tokenizer

_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_KINDS = ("char", "bytes", "gpt2", "bpe:N")
_LEARN_BYTES = 64 << 20  # of this much text, spread evenly, a BPE is learnt
_SPACES = re.compile(r"\s{7}")  # in every 1250th character, where 9999 white ones are in a row


def prepare(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | Tokenizer,
    val: float = 0.1,
    field: str | None = None,
) -> Header:
    """Turn text into a folder of token files that `Dataset.open` reads.

    The last part of the text is for validation: of plain text, from the first character that
    starts at or past the byte (1 - val) * size; of JSONL, the lines that start there. In a folder,
    and in JSONL, each document ends with `<|endoftext|>` (for char, which has none, a line feed).

    Args:
        source: a UTF-8 file; a folder of them, in the order of their paths, hidden ones left out;
            or the str "shakespeare", char-rnn's file, fetched once. It may be larger than memory.
        out: the folder to make. One that holds this very text prepared in this way is left as it
            is; any other that is not empty is refused.
        tokenizer: char, bytes, gpt2, or bpe:N to learn N ids from the training text (64 MiB of it);
            a text too short for N merges of what occurs twice gives fewer. Else a folder or a
            model's file that brings one (see `load_tokenizer`), or a tokenizer itself.
        val: the fraction for validation, 0 <= val < 1.
        field: the source is JSONL, with the text under this key.
    Returns:
        the header of the folder.
    Raises:
        InputError: for an argument or text that cannot work, or when `out` cannot be written; then
            nothing is left behind.
    """
    check_float("val", val, low=0, below=1)
    name, given = _given(tokenizer)
    if source == "shakespeare":
        source = cache_folder() / "data" / "shakespeare.txt"
        if not source.is_file():
            fetch(_SHAKESPEARE[0], source, _SHAKESPEARE[1])
    out = Path(out)
    text = Source.find(Path(source), field, val, leave_out=out)
    settings = {"source": text.sha256(), "tokenizer": name, "val": val, "field": field}
    if existing := _existing(out, settings, given):
        return existing
    with atomic_folder(out, "; pass another -o") as folder:
        encoding = given or _learnt(name, text)
        save_tokenizer(encoding, folder)
        splits = _write(folder, encoding, text)
        header = Header(vocab_size=encoding.n_vocab, splits=splits, **settings)
        header.write(folder)
        text.check_unchanged()
    return header


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


def _existing(out: Path, settings: dict[str, Any], given: Tokenizer | None) -> Header | None:
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
        if had != value or (name == "tokenizer" and given):
            fact = "other text" if name == "source" else f"{name} {show(had)}, not {show(value)}"
            raise InputError(f"{out} was prepared with {fact}: pass another -o, or remove it first")
    return data.header


def _learnt(kind: str, text: Source) -> Tokenizer:
    """The tokenizer that a text teaches: its characters, or for `bpe:N` its most frequent pairs."""
    if kind == "char":
        seen = np.zeros(0x110000, bool)
        for _, piece, _ in text.pieces("alphabet", end="\n"):
            seen[_codes(piece)] = True
        return char_tokenizer(map(chr, np.flatnonzero(seen)))
    learnt = (piece for is_val, piece, _ in text.pieces("words") if not is_val)
    every = max(1, -(-text.cut // _LEARN_BYTES))
    return bpe_tokenizer(train_bpe(islice(learnt, 0, None, every), int(kind.partition(":")[2])))


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _write(folder: Path, tokenizer: Tokenizer, text: Source) -> dict[str, Split]:
    """Write both token files."""
    counts = {split: np.zeros(3, np.int64) for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    end = "\n" if end_token(tokenizer) is None else ""
    parts = _grouped(text.pieces("tokens", end))
    with ExitStack() as stack:
        files = {s: stack.enter_context(open(folder / f"{s}.bin", "wb")) for s in SPLITS}
        for is_val, ids, counted in _on_all_cores(_converter(tokenizer), parts):
            split = SPLITS[is_val]
            files[split].write(ids)
            digests[split].update(ids)
            counts[split] += counted
        for split, file in files.items():
            if not file.tell() and not (split == "val" and text.cut == text.total):
                raise InputError(f"no text is left for {split}: give more text or another --val")
            file.flush()
            os.fsync(file.fileno())
    return {s: Split(*map(int, counts[s]), digests[s].hexdigest()) for s in SPLITS}


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of the same part together, until they are worth a thread's while."""
    group, size = [], 0
    for piece in pieces:
        if group and (piece[0] != group[0][0] or size >= PIECE_BYTES):
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece[1])
    if group:
        yield group


def _converter(
    tokenizer: Tokenizer,
) -> Callable[[list[Piece]], tuple[bool, np.ndarray, tuple[int, int, int]]]:
    """What turns a group into (whether for validation, ids, (tokens, characters, bytes))."""
    dtype, end = ids_dtype(tokenizer.n_vocab), end_token(tokenizer)
    last = np.array([] if end is None else [end], dtype)
    ranks = tokenizer.ranks
    id_of = np.zeros(0x110000 if tokenizer.name == "char" else 0, dtype)
    known = np.zeros(len(id_of), bool)
    lacking = any(bytes([byte]) not in ranks for byte in range(256))  # at one, tiktoken panics
    if len(id_of):
        for character, number in ranks.items():
            id_of[ord(character.decode())] = number
            known[ord(character.decode())] = True

    def ids_in(text: str) -> np.ndarray:
        if tokenizer.name == "char":
            codes = _codes(text)
            if not known[codes].all():
                encode(tokenizer, text)  # which says what the tokenizer lacks
            return id_of[codes]
        if tokenizer.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        normal = any(not token.special for token in tokenizer.added)
        if lacking or normal or _SPACES.search(text[::1250]):
            return np.array(encode(tokenizer, text), dtype)
        # Unlike encode, this holds Python's lock hardly ever, so that threads do run at once.
        return tokenizer.encoding.encode_to_numpy(text, disallowed_special=())

    def convert(group: list[Piece]) -> tuple[bool, np.ndarray, tuple[int, int, int]]:
        arrays = [np.empty(0, dtype)]
        for _, text, ends in group:
            if text:
                arrays.append(ids_in(text))
            if ends:
                arrays.append(last)
        ids = np.concatenate(arrays, dtype=dtype, casting="unsafe")
        characters = sum(len(text) for _, text, _ in group)
        size = sum(len(text.encode()) for _, text, _ in group)
        return group[0][0], ids, (len(ids), characters, size)

    return convert


def _on_all_cores(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The function of each item, in order; only a few items are in memory at a time."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores, waiting = len(usable(0)), deque()
    pool = ThreadPoolExecutor(cores)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > cores + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
