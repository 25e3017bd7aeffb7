"""Answers already paid for, in one SQLite file that several processes and runs may share.

The key holds everything that a new answer would depend on: messages, model, sampling and the draw's name (seed, device,
round, purpose, draw). It does not hold the endpoint's URL: the same model behind another port or replica is the same
model. A model served under one name with different options must be told apart by `variant`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from untether.sim.core.errors import ResumableStop, UserError, disk_is_full

_VERSION = 1
_BUSY_TIMEOUT_S = 60.0


def _value(text: str | None) -> dict[str, Any] | None:
    """A kept value; None for one that is gone or no value."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def cache_key(**content: Any) -> str:
    """Returns sha256 over the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """A table key -> JSON. Write-ahead logging and a busy timeout make it safe for several processes of one machine.

    `own`: it is the run's and nobody else's, so a damaged file is set aside and made anew.
    (SQLite's write-ahead log needs shared memory: on a network file system, one machine at a time.)
    """

    def __init__(self, path: str | Path, own: bool = False) -> None:
        self.path = Path(path)
        if own:
            self._set_aside_if_damaged()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
            self._open_patiently()
        except (sqlite3.DatabaseError, OSError) as error:
            if disk_is_full(error):
                raise ResumableStop(f"cannot write the cloud cache {self.path}: {error}. Free some space") from error
            raise UserError(
                f"cloud.cache: {self.path} cannot be used as a cache ({error}). "
                "Give the path of a file that untether made, or of one that does not exist yet"
            ) from error

    def _set_aside_if_damaged(self) -> None:
        """A run's own cache that cannot be read is kept beside, and made anew: its answers are asked for again."""
        if not self.path.exists():
            return
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)) as database:
                fine = database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        except sqlite3.OperationalError:
            return  # in use, or no access: said when it is opened
        except sqlite3.DatabaseError:
            fine = False
        if not fine:
            for file in (self.path, *(self.path.with_name(self.path.name + end) for end in ("-wal", "-shm"))):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(file, file.with_name(f"{file.name}.damaged"))

    def _open_patiently(self) -> None:
        """Try on while others open it: the change to a write-ahead log does not heed SQLite's busy timeout."""
        for attempt in range(200):
            try:
                return self._open()
            except sqlite3.OperationalError as error:
                self._database.rollback()
                if "locked" not in str(error) or attempt == 199:
                    raise
                time.sleep(0.02 + 0.002 * (os.getpid() % 16))

    def _open(self) -> None:
        database = self._database
        found = database.execute("PRAGMA user_version").fetchone()[0]
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables - {"answers"} or found not in (0, _VERSION):
            raise sqlite3.DatabaseError("it is another database, or a cache of another version")
        if database.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        if found != _VERSION:
            database.execute(f"PRAGMA user_version = {_VERSION}")
        database.commit()

    def several(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """Returns the values of the keys, None for those that are not there."""
        marks = ",".join("?" * len(keys))
        query = f"SELECT key, value FROM answers WHERE key IN ({marks})"
        try:
            found = dict(self._database.execute(query, list(keys)))
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"cloud.cache: {self.path} is damaged ({error}). Put it aside: what is in it will be asked for again"
            ) from error
        return [_value(found.get(key)) for key in keys]

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps a value; the first one kept under a key stays. Raises ResumableStop where the disk does not take it."""
        try:
            with self._database:
                self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(value)))
        except sqlite3.OperationalError as error:
            raise ResumableStop(f"cannot write the cloud cache {self.path}: {error}. Free some space") from error

    def replace(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps a value in the place of what was kept under this key."""
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))

    def values(self) -> list[dict[str, Any]]:
        """Returns all that is kept, in the order of the keys."""
        return [json.loads(row[0]) for row in self._database.execute("SELECT value FROM answers ORDER BY key")]

    def __len__(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        self._database.close()
