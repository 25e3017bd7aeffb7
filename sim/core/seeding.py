"""Every random draw comes from (seed, device, round, purpose): the one place that turns those words into a stream."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *words: object) -> int:
    """A 63-bit integer that depends on `seed` and every word, and on nothing else (not on process, host or order)."""
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *words: object) -> np.random.Generator:
    """An independent NumPy generator for (seed, *words), e.g. `generator(seed, device_id, round, "shuffle")`."""
    return np.random.default_rng(derive(seed, *words))
