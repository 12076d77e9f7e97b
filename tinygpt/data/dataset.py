"""Prepared tokens: opened with suspicion, given out as resumable batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinygpt.data.token_file import TokenFile
from tinygpt.errors import CheckpointError, InputError, show, unknown
from tinygpt.storage import check_digests, read_json, write_text
from tinygpt.tokenizer.encoding import folder_tokenizer, same_tokenizer
from tinygpt.tokenizer.tokenizer import Tokenizer

SPLITS = ("train", "val")
_FILE, _FORMAT = "header.json", "tinygpt data 1"
_ORDERS = ("random", "epoch")


def ids_dtype(vocab_size: int) -> np.dtype:
    """How ids are kept on the disk: little-endian, in two bytes wherever they suffice."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Split:
    """One token file: its tokens, the text they stand for, special tokens aside, its SHA-256."""

    tokens: int
    characters: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """What `header.json` says of a folder of token files, and the settings they were made with."""

    tokenizer: str  # as it was asked for: char, bytes, gpt2, bpe:N, or where it was found
    vocab_size: int
    source: str  # SHA-256 of what was read
    val: float  # the fraction asked for
    field: str | None  # of JSON and CSV
    splits: dict[str, Split]
    # The defaults are what was done before there were these.
    special_tokens: bool = False  # whether their spellings in the text were read as them
    keep_crlf: bool = True  # whether \r\n was left as it is
    special_tokens_found: int = 0  # how many spellings stood in the text

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids in the files."""
        return ids_dtype(self.vocab_size)

    def write(self, folder: Path) -> None:
        """Write `header.json`, whole or not at all."""
        content = {"format": _FORMAT, "dtype": self.dtype.name} | asdict(self)
        write_text(folder / _FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Header:
        """Read `header.json`.

        Raises:
            CheckpointError: when it cannot be read, is of another format or lacks something.
        """
        path = folder / _FILE
        match read_json(path):
            case {
                "format": str(form),
                "tokenizer": str(tokenizer),
                "vocab_size": int(vocab_size),
                "source": str(source),
                "val": int(val) | float(val),
                "field": str() | None as field,
                "dtype": dtype,
                "splits": {"train": dict(train), "val": dict(held_out)},
                **rest,
            }:
                splits = {"train": _split(train, path), "val": _split(held_out, path)}
                header = cls(tokenizer, vocab_size, source, val, field, splits)
                later = ("special_tokens", "keep_crlf", "special_tokens_found")
                found = {name: rest[name] for name in later if name in rest}
                fits = all(type(found[x]) is type(getattr(header, x)) for x in found)
                if fits and (form, dtype) == (_FORMAT, header.dtype.name) and vocab_size > 0:
                    return replace(header, **found)
        raise CheckpointError(
            f"{path}: it is not a header of format {_FORMAT!r}: prepare the text again"
        )


def _split(content: dict[str, Any], path: Path) -> Split:
    match content:
        case {
            "tokens": int(tokens),
            "characters": int(characters),
            "bytes": int(size),
            "sha256": str(digest),
        } if min(tokens, characters, size) >= 0:
            return Split(tokens, characters, size, digest)
    raise CheckpointError(f"{path}: {show(content)} does not describe a split: prepare again")


def tokens_folder(source: str | Path) -> Path | None:
    """The folder of prepared tokens that a path stands for, None where it stands for text.

    Raises:
        InputError: for a run's folder, which has its tokens in a folder inside.
    """
    folder = Path(source)
    names = (_FILE, *(f"{split}.bin" for split in SPLITS))
    if any((folder / name).is_file() for name in names):
        return folder
    if (folder / "data" / _FILE).is_file():
        raise InputError(f"{folder} is a run's folder: its tokens are in {folder / 'data'}")
    return None


@dataclass(frozen=True)
class Dataset:
    """A folder of token files: the header, and for each split its ids."""

    folder: Path
    header: Header
    train: TokenFile
    val: TokenFile

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Open what `prepare` made, and see that it is as it was made.

        Raises:
            CheckpointError: when a file is missing, unreadable, or not what the header says.
        """
        folder = Path(folder)
        try:
            check_digests(folder)  # of all but the tokens; folders of older versions have none
        except CheckpointError as error:
            raise CheckpointError(f"{error}: prepare the text again") from error
        header, files = Header.read(folder), []
        for name in SPLITS:
            split = header.splits[name]
            about = header.dtype, split.tokens, header.vocab_size, split.sha256
            files.append(TokenFile(folder / f"{name}.bin", *about))
        return cls(folder, header, *files)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            InputError: when its files are damaged or of another vocabulary than the header.
        """
        tokenizer = folder_tokenizer(self.folder)
        if tokenizer.n_vocab != self.header.vocab_size:
            raise CheckpointError(
                f"{self.folder}: its tokenizer has {tokenizer.n_vocab} ids, {_FILE} says "
                f"{self.header.vocab_size}: prepare the text again"
            )
        return tokenizer

    def check(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """Refuse a model that cannot have been meant for these tokens.

        Args:
            vocab_size: how many ids the model knows; it may know more than the data has.
            tokenizer: the model's own, where it has one.
        Raises:
            InputError: when an id is outside the model, or the tokenizers differ.
        """
        here = f"{self.folder} has tokens of {show(self.header.tokenizer)}"
        advice = "prepare the text with the model's tokenizer (--tokenizer takes its folder)"
        if self.header.vocab_size > vocab_size and self._highest_id() >= vocab_size:
            raise InputError(
                f"{here}, a vocabulary of {self.header.vocab_size}, but the model has "
                f"{vocab_size}: {advice}, or train a new model"
            )
        if tokenizer is not None and not same_tokenizer(self.tokenizer(), tokenizer):
            raise InputError(
                f"{here}, but the model's tokenizer {tokenizer.name!r} gives other ids: "
                f"{advice}, or train a new model"
            )

    def _highest_id(self) -> int:
        """The highest id that occurs: a pad token, beyond what a model knows, mostly does not."""
        return max(self.train.highest, self.val.highest)


class Batches:
    """An endless iterator of (inputs, targets), int32 arrays (B, T); targets are one token later.

    A batch depends on the seed and its number alone, so `state` is exact and small. The next one is
    made in the background while the one before is being used.
    """

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        batch_size: int,
        block_size: int,
        seed: int,
        order: Literal["random", "epoch"] = "random",
    ) -> None:
        """
        Args:
            tokens: (N,) ids, at least block_size + 1.
            batch_size: B.
            block_size: T.
            seed: 0 to 2**63-1.
            order: "random" draws windows that start anywhere; "epoch" gives every window of the
                text, cut end to end, once before any again, each time in another order. What is
                left at the end, shorter than a window, is never seen.
        Raises:
            InputError: for an argument that cannot work, or too few tokens.
        """
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("block_size", block_size, 1),
            ("seed", seed, 0),
        ):
            if type(value) is not int or not least <= value < 2**63:
                raise InputError(
                    f"{name} is {show(value)}: it must be a whole number from {least} to 2**63-1"
                )
        if order not in _ORDERS:
            raise unknown("order of batches", order, _ORDERS)
        if len(tokens) <= block_size:
            raise InputError(
                f"a split of the text has {len(tokens)} tokens, too few for a window of "
                f"{block_size} and the token after it: give more text or a smaller --context"
            )
        self._tokens, self._shape = tokens, (batch_size, block_size)
        self._seed, self._order, self._step = seed, order, 0
        self._epoch, self._shuffled = (seed, -1), np.empty(0, np.int64)
        self._worker = ThreadPoolExecutor(1, "batches")  # one: it makes batches in order
        self._next = self._worker.submit(self._make, seed, 0)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        batch = self._next.result()
        self._step += 1
        self._next = self._worker.submit(self._make, self._seed, self._step)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the batches given out so far end, and what decides the rest; fit for JSON."""
        fixed = {"order": self._order, "tokens": len(self._tokens)}
        fixed |= dict(zip(("batch_size", "block_size"), self._shape, strict=True))
        return {"seed": self._seed, "step": self._step} | fixed

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken, in this process or an earlier one.

        Raises:
            InputError: when it was taken with other tokens, sizes or another order.
        """
        position = {name: state.get(name) for name in ("seed", "step")}
        for name, value in position.items():
            if type(value) is not int or not 0 <= value < 2**63:
                raise CheckpointError(f"the position in the data has {name} {show(value)}")
        for name, ours in self.state().items():
            if name not in position and state.get(name) != ours:
                raise InputError(
                    f"the checkpoint was made with {name} {show(state.get(name))}, this run has "
                    f"{ours}: go on with the same, or start a new run"
                )
        self._seed, self._step = position["seed"], position["step"]
        self._next = self._worker.submit(self._make, self._seed, self._step)

    def _make(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        length = self._shape[1] + 1
        starts = self._starts(seed, step).tolist()
        windows = np.stack([self._tokens[i : i + length] for i in starts]).astype(np.int32)
        return windows[:, :-1].copy(), windows[:, 1:].copy()

    def _starts(self, seed: int, step: int) -> np.ndarray:
        """Where the windows of a batch start: (B,)."""
        (batch_size, block_size), last = self._shape, len(self._tokens) - 1
        if self._order == "random":
            draw = np.random.default_rng((seed, step))
            return draw.integers(0, last - block_size, batch_size, endpoint=True)
        starts = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(position, last // block_size)
            if self._epoch != (seed, epoch):
                self._epoch, draw = (seed, epoch), np.random.default_rng((seed, epoch))
                self._shuffled = draw.permutation(last // block_size)
            starts.append(self._shuffled[place] * block_size)
        return np.array(starts)
