"""A store of results worth keeping: key -> bytes, in one SQLite file that several processes and runs share.

A key is a digest of everything that the bytes depend on, so nothing in the store is ever replaced.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from untether.sim.core.errors import ResumableStop, UserError, disk_is_full

_BUSY_TIMEOUT_S = 60.0
_MANY = 500
"""Keys that are asked for at once."""


class ByteStore:
    """A table key -> value in a file of the folder `engine.cache`.

    Raises:
        UserError: `path` is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)
            with self._database as database:
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
                )
        except (sqlite3.DatabaseError, OSError) as error:
            self._stop_if_full(error)
            raise UserError(
                f"engine.cache: {path} cannot be used ({error}). Delete it, or give another folder"
            ) from error

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Returns the values of those keys that are present."""
        found: dict[bytes, bytes] = {}
        for some in _portions(keys):
            marks = ",".join("?" * len(some))
            found |= dict(self._database.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", some))
        return found

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Keeps values, all or none; the first one kept under a key stays.

        Raises:
            ResumableStop: The disk does not take them.
        """
        try:
            with self._database as database:
                database.executemany("INSERT OR IGNORE INTO kept VALUES (?, ?)", values.items())
        except sqlite3.OperationalError as error:
            self._stop_if_full(error)
            raise ResumableStop(f"cannot write {self.path}: {error}. See to it, then resume the run.") from error

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _stop_if_full(self, error: BaseException) -> None:
        if disk_is_full(error):
            raise ResumableStop(f"cannot write {self.path}: {error}. Free some space, then resume the run.") from error


def _portions(keys: Sequence[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _MANY):
        yield list(keys[start : start + _MANY])
