"""Tables of tinygrad's cache on disk, from any thread, and without an error where it cannot be had.

tinygrad opens its SQLite file once, for the thread that comes first, waits a minute at each kernel
where another process has locked it, and ends where it cannot be read. What is missing here is made
anew, so that nothing that may go wrong matters: after the first fault of the file, one line says
so, and all goes on without it.
"""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tinygrad import device, helpers
from tinygrad.helpers import CACHELEVEL, VERSION

from tinygpt.errors import reason, say

# How long to wait for another process, which writes for milliseconds, unless it hangs.
_WAIT_S = 2.0


def file() -> Path:
    """The file in which tinygrad keeps compiled kernels, and we captured steps."""
    return Path(helpers.CACHEDB).absolute()


def fault() -> Exception | None:
    """What keeps the file from being read and written, if anything does."""
    try:
        with closing(_connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except (sqlite3.Error, OSError) as error:
        return error
    return None


def forgive() -> None:
    """Have tinygrad itself use the file as this module does: see `device.forgive_cache`."""
    helpers.db_connection = _tinygrads_connection  # its functions look it up there
    device.diskcache_get = _forgiving(device.diskcache_get)
    device.diskcache_put = _forgiving(device.diskcache_put)


def read(table: str, key: str) -> Any:
    """What was written under the key, or None."""
    if CACHELEVEL.value < 1 or not os.path.exists(file()):
        return None
    return _forgiving(_read)(table, key)


def _read(table: str, key: str) -> Any:
    with closing(_connect()) as connection:
        query = f"SELECT val FROM '{table}_{VERSION}' WHERE key=?"
        found = connection.execute(query, (key,)).fetchone()
    return None if found is None else pickle.loads(found[0])


def write(table: str, key: str, value: Any) -> None:
    """Keep a value that can be pickled, in place of what was there."""
    if CACHELEVEL.value >= 1:
        _forgiving(_write)(f"{table}_{VERSION}", key, value)


def _write(name: str, key: str, value: Any) -> None:
    with closing(_connect()) as connection:
        create = f"CREATE TABLE IF NOT EXISTS '{name}' (key text, val blob, PRIMARY KEY (key))"
        connection.execute(create)
        row = (key, pickle.dumps(value))
        connection.execute(f"REPLACE INTO '{name}' (key, val) VALUES (?, ?)", row)
        connection.commit()


def _connect() -> sqlite3.Connection:
    file().parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file(), timeout=_WAIT_S, isolation_level="IMMEDIATE")
    # A cache that a power cut takes back by a moment is still a cache, and need not be waited for.
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _tinygrads_connection() -> sqlite3.Connection:
    """As tinygrad's `db_connection`, but for the wait."""
    inside: Any = helpers
    if inside._db_connection is None:
        inside._db_connection = _connect()
        with suppress(sqlite3.OperationalError):  # another process sets it just now
            inside._db_connection.execute("PRAGMA journal_mode=WAL").fetchone()
    return inside._db_connection


def _forgiving(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, giving None where it fails, and the last one where it is the file that fails."""

    def attempt(*args: Any) -> Any:
        try:
            return step(*args)
        except (sqlite3.Error, OSError) as error:
            if _is_the_files(error):
                _give_up(error)
        except Exception:  # a pickle that is cut short, or is of something that has moved
            pass
        return None

    return attempt


def _is_the_files(error: Exception) -> bool:
    """Whether it would come again: a table that is not there, or another thread, are no fault."""
    if isinstance(error, OSError):
        return True
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISUSE)


def _give_up(error: Exception) -> None:
    """Use no cache from now on, in this process, and say so."""
    if CACHELEVEL.value >= 1:
        CACHELEVEL.value = 0
        say(
            f"compiles without the cache of kernels, {file()} ({reason(error)}): "
            "CACHEDB can name another file"
        )
