"""Files: read with suspicion, written whole or not at all, and their faults told in one line."""

from __future__ import annotations

import codecs
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tinygpt.errors import CheckpointError, InputError, reason, show

if TYPE_CHECKING:
    from tinygrad.helpers import tqdm

# No file of text that a model brings along comes near these, not even a large vocabulary. As
# Python's objects, JSON takes up to 55 times its bytes.
MAX_TEXT_BYTES, _MAX_JSON_BYTES = 64 << 20, 12 << 20
LONG_BYTES = 1 << 30  # of weights, to read or write: a second or more
TEMPORARY = ".*.tmp"  # matches every name by `temporary_beside`, to find what a killed process left


def byte_bar(title: str, total: int | None, least: int = 0) -> tqdm:
    """A progress bar that counts bytes: at a terminal, and where there are `least` of them."""
    # Imported here, because most of what reads files shows no bar.
    from tinygrad.helpers import tqdm

    hidden = True if total is not None and total < least else None
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=hidden)


def need(condition: bool, fact: str) -> None:
    """Raise ValueError where a file lacks what it needs; who reads it adds the file's name.

    The fact is worded on every call: what is checked for each of many tensors raises by itself.
    """
    if not condition:
        raise ValueError(fact)


def read_bytes(path: str | Path, most_bytes: int) -> bytes:
    """What is in a plain file that must not be larger.

    Raises:
        OSError, ValueError: when it cannot be read, is none, or has more.
    """
    pipe = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
    need(not pipe, "it is no plain file")  # open() would wait for a writer
    with open(path, "rb") as file:
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


def temporary_beside(path: str | Path) -> Path:
    """A path in the same folder that nothing else has, for what is to be renamed when complete."""
    return Path(path).parent / f".{secrets.token_hex(8)}.tmp"


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
            yield file
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
        raise type(error)(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}{advice}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
