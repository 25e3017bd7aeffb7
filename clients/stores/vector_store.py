"""A store of embeddings. A key holds the encoder's fingerprint and the text: equal keys, equal vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from untether.clients.stores.byte_store import ByteStore


class VectorStore:
    """text -> float32 vector, for the encoder of that fingerprint (weights, dtype, length limit)."""

    def __init__(self, path: Path, fingerprint: str):
        self._store, self._fingerprint = ByteStore(path), fingerprint.encode()

    def get(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the vectors of those texts that are present."""
        by_key = {self._key(text): text for text in texts}
        found = self._store.get(list(by_key))
        return {by_key[key]: np.frombuffer(blob, dtype="<f4").astype(np.float32) for key, blob in found.items()}

    def put(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps vectors, all or none.

        Raises:
            ResumableStop: The disk does not take them.
        """
        self._store.put({self._key(text): vector.astype("<f4").tobytes() for text, vector in vectors.items()})

    def _key(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._fingerprint, digest_size=16).digest()
