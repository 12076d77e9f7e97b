"""Pieces of text to ids, on all cores."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tinygpt.data.corpus import END_LINE, PIECE_BYTES, Piece
from tinygpt.data.dataset import ids_dtype
from tinygpt.tokenizer.encoding import end_token
from tinygpt.tokenizer.tokenizer import END, Tokenizer

# One or several lines of the end token alone; no piece ends inside of one.
_END_LINES = re.compile(rf"(?:(?:\A|\n){re.escape(END)})+(?:\n|\Z)")
_SPACES = re.compile(r"\s{7}")  # in every 1250th character, where 9999 white ones are in a row


def codes(text: str) -> np.ndarray:
    """The numbers of a text's characters."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
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


class _Finder:
    """Finds some names in texts: all that stand there, the longest at each place."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> list[str]:
        # To look for one by itself takes a fifth of the time.
        few = len(self._names) < 5
        if few and not any(name in text for name in self._names):
            return []
        return self._pattern.findall(text)


class Converter:
    """Pieces of text to ids, on any thread."""

    def __init__(self, tokenizer: Tokenizer, names: list[str], as_tokens: bool) -> None:
        """
        Args:
            names: the special tokens' spellings, which are counted.
            as_tokens: whether they are read as these tokens.
        """
        self.tokenizer, self.as_tokens = tokenizer, as_tokens
        self.dtype, self.end = ids_dtype(tokenizer.n_vocab), end_token(tokenizer)
        self.end_text = "\n" if self.end is None and b"\n" in tokenizer.ranks else ""
        self._special = _Finder(names)
        normal = [token.content for token in tokenizer.added if not token.special]
        self._meant = _Finder([*normal, *names] if as_tokens else normal)
        # With a token that takes the white space behind it, no piece may end.
        greedy = [token.content for token in tokenizer.added if token.rstrip]
        self.whole = [*normal, *names, *(name + sign for name in greedy for sign in " \n")]
        self._separated = as_tokens and END in names
        if self._separated:
            self.whole += [END_LINE, END_LINE[1:], f"{END} "]
        ranks = tokenizer.ranks
        # At a byte that a vocabulary lacks, tiktoken panics.
        self._lacking = any(bytes([byte]) not in ranks for byte in range(256))
        self._id_of = np.zeros(0x110000 if tokenizer.name == "char" else 0, self.dtype)
        self._known = np.zeros(len(self._id_of), bool)
        if len(self._id_of):
            for character, number in ranks.items():
                self._id_of[ord(character.decode())] = number
                self._known[ord(character.decode())] = True

    def __call__(
        self, group: list[Piece]
    ) -> tuple[bool, np.ndarray, tuple[int, int, int], list[str], list[str]]:
        """Whether for validation, ids, (tokens, characters, bytes), special tokens, what is lost.

        Text that is read as special tokens, or lost, is not counted.
        """
        arrays, characters, size, spelt = [np.empty(0, self.dtype)], 0, 0, list[str]()
        lost = list[str]()
        for _, text, ends in group:
            spelt += self._special(text)
            aside = ""
            if self._separated:
                text = _END_LINES.sub(lambda found: found[0].replace("\n", ""), text)
            if self._meant(text):
                for part, token in self.tokenizer.parts(text, self.as_tokens):
                    ids = self._ordinary(part, lost) if token is None else self._one(token.id)
                    arrays.append(ids)
                    aside += part if token and token.special else ""
            elif text:
                arrays.append(self._ordinary(text, lost))
            characters += len(text) - len(aside)
            size += len(text.encode()) - len(aside.encode())
            if ends and self.end is not None and self.end not in arrays[-1][-1:]:
                arrays.append(self._one(self.end))
        ids = np.concatenate(arrays, dtype=self.dtype, casting="unsafe")
        characters, size = characters - len(lost), size - len("".join(lost).encode())
        return group[0][0], ids, (len(ids), characters, size), spelt, lost

    def _one(self, number: int) -> np.ndarray:
        return np.array([number], self.dtype)

    def _ordinary(self, text: str, lost: list[str]) -> np.ndarray:
        """The ids of a text in which no added token is meant.

        Args:
            lost: gets the characters that a vocabulary of characters lacks.
        """
        if self.tokenizer.name == "char":
            numbers = codes(text)
            known = self._known[numbers]
            if not known.all():
                lost.extend(map(chr, numbers[~known].tolist()))
                numbers = numbers[known]
            return self._id_of[numbers]
        if self.tokenizer.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        if self._lacking or _SPACES.search(text[::1250]):
            return np.array(self.tokenizer.merge(text), self.dtype)
        # Unlike encode, this holds Python's lock hardly ever, so that threads do run at once.
        return self.tokenizer.encoding.encode_to_numpy(text, disallowed_special=())


def on_all_cores(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
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
