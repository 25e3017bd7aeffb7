"""Embeddings that were made once, in one SQLite file that several processes and runs may share.

A key holds the encoder's fingerprint (weights, dtype, length limit) and the text: equal keys, equal vectors.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sim.errors import ResumableStop, UserError, disk_is_full

_BUSY_TIMEOUT_S = 60.0
_MANY = 500
"""Keys that are asked for at once."""


class VectorStore:
    """A table key -> float32 vector, for one encoder. Raises UserError where `path` is no such file."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self._fingerprint = path, fingerprint.encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)
            with self._database as database:
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
                )
        except (sqlite3.DatabaseError, OSError) as error:
            self._stop_if_full(error)
            raise UserError(
                f"engine.cache: {path} cannot be used ({error}). Delete it, or give another folder"
            ) from error

    def get(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The vectors of those texts that are there."""
        by_key = {self._key(text): text for text in texts}
        found = {}
        for keys in _portions(list(by_key)):
            marks = ",".join("?" * len(keys))
            for key, blob in self._database.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", keys):
                found[by_key[key]] = np.frombuffer(blob, dtype="<f4").astype(np.float32)
        return found

    def put(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps vectors, all or none. Raises ResumableStop where the disk does not take them."""
        rows = [(self._key(text), vector.astype("<f4").tobytes()) for text, vector in vectors.items()]
        try:
            with self._database as database:
                database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            self._stop_if_full(error)
            raise ResumableStop(f"cannot write {self.path}: {error}. See to it, then resume the run.") from error

    def _stop_if_full(self, error: BaseException) -> None:
        if disk_is_full(error):
            raise ResumableStop(f"cannot write {self.path}: {error}. Free some space, then resume the run.") from error

    def _key(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._fingerprint, digest_size=16).digest()


def _portions(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _MANY):
        yield keys[start : start + _MANY]
