"""Diversity: no near-duplicate of a real sample, nor of a synthetic one that was accepted before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from untether.clients.filters.case import Case, Finding


class Diversity:
    """Greedy in the samples' order: the largest cosine to a real or an already accepted sample is <= `max_similarity`.

    The score is 1 minus that cosine: 0 for a copy, 1 for something unrelated. Only samples that pass every filter count
    as accepted, so a rejected sample never makes another one a duplicate. With nothing to compare to there is no score,
    and the sample passes.
    """

    def __init__(self, section: Any) -> None:
        self.embeds = section.reads
        self._max_similarity = section.max_similarity

    def examine(self, case: Case) -> _Greedy:
        return _Greedy(case.sample_vectors[self.embeds], case.real_vectors[self.embeds], self._max_similarity)


class _Greedy:
    """`samples` is `[samples, dim]`, `real` is `[real, dim]`; `nearest` the largest cosine so far, `[samples]`."""

    def __init__(self, samples: np.ndarray, real: np.ndarray, max_similarity: float) -> None:
        self._among = np.clip(samples @ samples.T, -1.0, 1.0)
        to_real = np.clip(samples @ real.T, -1.0, 1.0)
        self._nearest = to_real.max(axis=1, initial=-np.inf)
        self._max_similarity = max_similarity

    def finding(self, index: int) -> Finding:
        cosine = float(self._nearest[index])
        if cosine == -np.inf:
            return Finding(None, True)
        score = 1.0 - cosine
        return Finding(score, score >= 1.0 - self._max_similarity)

    def accept(self, index: int) -> None:
        np.maximum(self._nearest, self._among[index], out=self._nearest)
