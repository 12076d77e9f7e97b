"""Folders of downloads that are not complete: one process has each, and the next goes on with it.

A folder is held by a lock of the system, which ends with the process, however that ends.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from tinygpt.errors import InputError
from tinygpt.storage import TEMPORARY, temporary_beside

_OLD_S = 7 * 24 * 3600  # what nobody has gone on with for so long is not waited for


class Cut(InputError):
    """A download ended too early: another try may go on with what there is."""


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is to become it, which no other process has or sweeps.

    It may hold what a process has left there that was killed. It stays where the block is cut, if
    there is an ETag in it to go on with, and is removed otherwise.

    Raises:
        OSError: when it cannot be made.
    """
    with _free_folder(target) as folder:
        stays = False
        try:
            yield folder
        except (Cut, KeyboardInterrupt):
            stays = any(folder.glob("*.etag"))
            raise
        finally:
            if not stays:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _free_folder(target: Path) -> Iterator[Path]:
    for number in count():
        folder = target.parent / f".{target.name}.{number}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # it is none
            continue
        with _held(folder) as mine:
            if mine:
                yield folder
                return
        if mine is None:  # there are no such locks here, and nobody can go on with it
            break
    folder = temporary_beside(target)
    folder.mkdir()
    yield folder


def sweep(parent: Path, name: str = "") -> list[Path]:
    """Remove what killed downloads have left in a folder, and no running one has; what it was.

    Those of the model of that name, of models that are complete by now, and old ones.
    """
    swept = []
    for path in [*parent.glob(".*.part"), *parent.glob(TEMPORARY)]:
        model = path.name[1:].rpartition(".")[0].rpartition(".")[0]  # "" of a `.tmp`
        done = model and (model == name or (parent / model).exists())
        with suppress(OSError), _held(path) as mine:  # OSError: it is gone, or not ours
            if mine is not False and (_is_old(path) or (mine and done)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept.append(path)
    return swept


def _is_old(path: Path) -> bool:
    newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    return time.time() - newest > _OLD_S


@contextmanager
def _held(path: Path) -> Iterator[bool | None]:
    """Hold a folder or file while the block runs: whether that is so; None without locks here."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield None
        return
    # Without waiting, as for a pipe that stands there.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another may have removed it between the two, and made it anew.
            mine = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError:  # a network drive that has none
            mine = None
        yield mine
    finally:
        os.close(descriptor)
