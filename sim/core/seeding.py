"""Random streams: every random draw follows from (seed, device, round, purpose), and this module makes its stream."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *words: object) -> int:
    """Returns a 63-bit integer that depends on `seed` and the words alone (not on process, host or order)."""
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *words: object) -> np.random.Generator:
    """Returns an independent NumPy generator for (seed, *words), e.g. `generator(seed, device_id, round, "shuffle")`.
    """
    return np.random.default_rng(derive(seed, *words))
