"""A file of token ids: checked when it is opened, and found out when it changes afterwards."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from threading import Lock

import numpy as np

from tinygpt.errors import CheckpointError, reason
from tinygpt.storage import LONG_BYTES, byte_bar, open_plain

_PART = 1 << 20  # bytes that are checked at a time


class TokenFile:
    """The ids in a file, as `prepare` wrote them: a slice gives a part of them.

    Parts are read and not mapped: where a mapped file is cut, the system ends the program.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, tokens: int, vocab_size: int, sha256: str
    ) -> None:
        """
        Args:
            tokens: how many it must have.
            vocab_size: above every id.
            sha256: of its bytes.
        Raises:
            CheckpointError: when it cannot be read or is not the file that was prepared.
        """
        self.highest = 0  # of its ids
        self._path, self._dtype, self._tokens = path, dtype, tokens
        self._vocab_size, self._sha256 = vocab_size, sha256
        self._lock = Lock()  # of the place in the file
        try:
            self._file = open_plain(path).detach()  # unbuffered: what is read stands there now
            self._check()
        except OSError as error:
            raise self._error(error) from error

    def __len__(self) -> int:
        return self._tokens

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __getitem__(self, places: slice) -> np.ndarray:
        """The ids from one place to another.

        Raises:
            CheckpointError: when the file can no longer be read or has become another.
        """
        start, stop, _ = places.indices(self._tokens)
        found = np.empty(max(0, stop - start), self._dtype)
        try:
            with self._lock:
                for _ in range(2):
                    self._file.seek(start * self._dtype.itemsize)
                    whole = self._file.readinto(found) == found.nbytes
                    # The second, since writes through a map need not change the file's time.
                    if whole and self._time() == self._seen and self._in_vocabulary(found):
                        return found
                    self._check()
            raise OSError("it changes while it is read")
        except OSError as error:
            raise self._error(error) from error

    def _in_vocabulary(self, ids: np.ndarray) -> bool:
        return int(ids.max(initial=0)) < self._vocab_size

    def _time(self) -> tuple[int, int]:
        """What differs once the file was written to."""
        now = os.fstat(self._file.fileno())
        return now.st_size, now.st_mtime_ns

    def _check(self) -> None:
        """Read all of it, and raise OSError where that is not what was prepared."""
        before, wanted = self._time(), self._tokens * self._dtype.itemsize
        if (size := before[0]) != wanted:
            raise OSError(
                f"it has {size} bytes, but {self._tokens} tokens of {self._dtype.name} have "
                f"{wanted}"
            )
        digest, self.highest = hashlib.sha256(), 0
        ids = np.empty(_PART // self._dtype.itemsize, self._dtype)
        self._file.seek(0)
        with byte_bar(f"checking {self._path.name}", size, LONG_BYTES) as bar:
            while count := self._file.readinto(ids):
                part = ids[: count // self._dtype.itemsize]
                digest.update(part)
                self.highest = max(self.highest, int(part.max(initial=0)))
                bar.update(count)
        if self.highest >= self._vocab_size:
            raise OSError(f"it has the id {self.highest}, the vocabulary {self._vocab_size} ids")
        if digest.hexdigest() != self._sha256:
            raise OSError("its SHA-256 is not that of the tokens that were prepared")
        self._seen = before

    def _error(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {reason(error)}: remove {self._path.parent} and prepare the text again"
        )
