"""Tables of tinygrad's cache on disk, from any thread, and without an error where it is damaged.

tinygrad opens its SQLite file once, for the thread that comes first, and ends where it cannot be
read. What is missing here is made anew, so that nothing that may go wrong matters.
"""

from __future__ import annotations

import os
import pickle
import sqlite3
from contextlib import closing, suppress
from typing import Any

from tinygrad import helpers
from tinygrad.helpers import CACHELEVEL, VERSION


def _connect() -> sqlite3.Connection:
    return sqlite3.connect(helpers.CACHEDB, timeout=10, isolation_level="IMMEDIATE")


def read(table: str, key: str) -> Any:
    """What was written under the key, or None."""
    if CACHELEVEL.value < 1 or not os.path.exists(helpers.CACHEDB):
        return None
    with suppress(Exception), closing(_connect()) as connection:
        query = f"SELECT val FROM '{table}_{VERSION}' WHERE key=?"
        if (found := connection.execute(query, (key,)).fetchone()) is not None:
            return pickle.loads(found[0])
    return None


def write(table: str, key: str, value: Any) -> None:
    """Keep a value that can be pickled, in place of what was there."""
    if CACHELEVEL.value < 1:
        return
    name = f"{table}_{VERSION}"
    with suppress(Exception):
        os.makedirs(os.path.dirname(helpers.CACHEDB) or ".", exist_ok=True)
        with closing(_connect()) as connection:
            create = f"CREATE TABLE IF NOT EXISTS '{name}' (key text, val blob, PRIMARY KEY (key))"
            connection.execute(create)
            row = (key, pickle.dumps(value))
            connection.execute(f"REPLACE INTO '{name}' (key, val) VALUES (?, ?)", row)
            connection.commit()
