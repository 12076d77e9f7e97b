"""Files: read with suspicion, written whole or not at all, and their faults told in one line."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tinygpt.errors import CheckpointError, InputError, one_line, reason, show

if TYPE_CHECKING:
    from tinygrad.helpers import tqdm

# No file of text that a model brings along comes near these, not even a large vocabulary. As
# Python's objects, JSON takes up to 55 times its bytes.
MAX_TEXT_BYTES, _MAX_JSON_BYTES = 64 << 20, 12 << 20
LONG_BYTES = 1 << 30  # of weights, to read or write: a second or more
DIGESTS = "SHA256SUMS"  # of a folder's files, as the program sha256sum writes and checks it
_DIGEST = re.compile(r"([0-9a-f]{64})  ([\w-][\w.-]{0,200})", re.ASCII)
TEMPORARY = ".*.tmp"  # matches every name by `temporary_beside`, to find what a killed process left


def byte_bar(title: str, total: int | None, least: int = 0) -> tqdm:
    """A progress bar that counts bytes: at a terminal, and where there are `least` of them."""
    # Imported here, because most of what reads files shows no bar.
    from tinygrad.helpers import tqdm

    hidden = True if total is not None and total < least else None
    return tqdm(total=total, desc=one_line(title, 100), unit="B", unit_scale=True, disable=hidden)


def need(condition: bool, fact: str) -> None:
    """Raise ValueError where a file lacks what it needs; who reads it adds the file's name.

    The fact is worded on every call: what is checked for each of many tensors raises by itself.
    """
    if not condition:
        raise ValueError(fact)


def open_plain(path: str | Path) -> BufferedReader:
    """A plain file opened to be read: no pipe, device or socket, which may wait or never end.

    Raises:
        OSError: when it cannot be opened, or is none.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, open() says so
        raise OSError("it is no plain file")
    # They are no files either, though they look like some: a few wait, and some have no end.
    if os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise OSError("it is no plain file: the system makes it up while it is read")
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was changed in between
        file.close()
        raise OSError("it is no plain file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def remove_unless_plain(path: Path) -> None:
    """Make room for a file of our own where a folder, a link, a pipe or a device has its name."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            shutil.rmtree(path)
        elif not stat.S_ISREG(mode):
            path.unlink()


def read_bytes(path: str | Path, most_bytes: int) -> bytes:
    """What is in a plain file that must not be larger.

    Raises:
        OSError, ValueError: when it cannot be read, is none, or has more.
    """
    with open_plain(path) as file:
        data = file.read(most_bytes + 1)
    need(len(data) <= most_bytes, f"it has more than {most_bytes >> 20} MiB")
    return data.removeprefix(codecs.BOM_UTF8)  # Windows' editors put it before a text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs: what `json` is to call for each.

    Raises:
        ValueError: when a key appears twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {show(twice)} appears twice")
    return found


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object in which no key appears twice, so that no two readers disagree about it.

    Raises:
        ValueError: when the bytes are anything else.
    """
    if not text.lstrip().startswith(b"{"):
        raise ValueError("it must hold a JSON object, starting with {")
    try:
        return json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON is damaged: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file: see `parse_json`.

    Raises:
        CheckpointError: when the file cannot be read or holds anything else.
    """
    try:
        return parse_json(read_bytes(path, _MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error


def read_text(path: str | Path, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 file's text.

    Raises:
        CheckpointError: when the file cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path, most_bytes).decode()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all: see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_whole(file: FileIO, data: bytes) -> None:
    """Write all of some bytes, at once: of a disk that fills up, a part may be there.

    Raises:
        OSError: when they cannot all be written.
    """
    while data:  # a disk that is full takes a part, before it says so
        data = data[file.write(data) :]


def temporary_beside(path: str | Path) -> Path:
    """A path in the same folder that nothing else has, for what is to be renamed when complete."""
    return Path(path).parent / f".{secrets.token_hex(8)}.tmp"


# Of the files that are being written: their hashes by name, and the thread that computes them.
_hashing: ContextVar[tuple[dict[str, Any], ThreadPoolExecutor] | None]
_hashing = ContextVar("hashing", default=None)


@contextmanager
def digests_of_written() -> Iterator[dict[str, Any]]:
    """The SHA-256 of each file that `atomic_file` writes meanwhile: a hash by the file's name.

    A thread computes it while the system writes.
    """
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(1, "digests") as thread:
        before = _hashing.set((found, thread))
        try:
            yield found
        finally:
            _hashing.reset(before)


class _Hashed:
    """A file of which a hash sees all that is written to it."""

    def __init__(self, file: BinaryIO, seen: Any, thread: ThreadPoolExecutor) -> None:
        self._file, self._seen, self._thread = file, seen, thread

    def write(self, data: bytes) -> int:
        seeing = self._thread.submit(self._seen.update, data)
        try:
            return self._file.write(data)
        finally:
            seeing.result()  # before the data may change


def _hashed(file: BinaryIO, name: str) -> BinaryIO:
    """The file, or what hashes it on the way, where digests are wanted."""
    if (hashing := _hashing.get()) is None:
        return file
    found, thread = hashing
    found[name] = hashlib.sha256()
    return cast(BinaryIO, _Hashed(file, found[name], thread))


def write_digests(folder: Path, digests: Mapping[str, Any]) -> None:
    """Write down what the files of a folder are to be: see `digests_of_written`."""
    lines = (f"{found.hexdigest()}  {name}\n" for name, found in digests.items())
    write_text(folder / DIGESTS, "".join(lines))


def check_digests(folder: Path) -> list[str]:
    """Refuse a folder of which a file is not as it was written.

    Returns:
        the files' names; none where the folder, being older, has no digests.
    Raises:
        CheckpointError: naming the first such file.
    """
    path = folder / DIGESTS
    if not os.path.lexists(path):
        return []
    *lines, end = read_text(path, 1 << 20).split("\n")
    found = [match for line in lines if (match := _DIGEST.fullmatch(line))]
    if end or not lines or len(found) < len(lines):
        raise CheckpointError(f"{path}: it is damaged")
    for match in found:
        check_digest(folder / match[2], match[1])
    return [match[2] for match in found]


def check_digest(path: Path, expected: str) -> None:
    """Refuse a file that has another SHA-256 than the one expected, in hexadecimal.

    Raises:
        CheckpointError: naming it, and the beginnings of both.
    """
    try:
        need(path.is_file(), "it is missing")
        with open_plain(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    if digest != expected:
        fact = f"its SHA-256 is {digest[:8]}..., not {show(expected[:8])[1:-1]}..."
        raise CheckpointError(f"{path}: it is not as it was written: {fact}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` only once it is complete and on the disk.

    It is written under a temporary name beside `path`. When the block fails, in whatever way, that
    file is removed and what was at `path` before stays.

    Raises:
        InputError: when the file cannot be written: which, and why.
    """
    target = Path(os.path.realpath(path))  # write through a link, do not replace it
    temporary = temporary_beside(target)
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is there, but not as a file")
        with open(temporary, "xb") as file:
            yield _hashed(file, target.name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Where the system allows it, see to it that new names in a folder survive a power cut too."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_folder(path: str | Path, advice: str = "") -> Iterator[Path]:
    """A folder that has its name only once the block is through, and is gone if that fails.

    Raises:
        InputError: when it cannot be written: which, why, and the advice.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_beside(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, target)  # this replaces an empty folder, and no other
    except InputError as error:  # of a file inside, whose place nobody was told of
        raise type(error)(str(error).replace(one_line(str(temporary)), str(path))) from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}{advice}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
