"""Semantic consistency: is the sample about what this user's real samples are about, without being one of them?"""

from __future__ import annotations

from typing import Any

import numpy as np

from untether.clients.filters.case import Case, Finding, Fixed


class Semantic:
    """Cosine of the sample's embedding to the user's real samples of the task: `low <= score <= high`.

    The score is the largest cosine to any of them (`reduce = "max"`: near to one thing the user did) or the mean over
    them (`"mean"`: near to all they did; lower by nature, and lower still for a user with many interests). The upper
    bound rejects copies. The filter and its two bounds: CDCDA-PLM (arXiv 2508.21313). A user without a real sample of
    the task has no score, and the sample passes.
    """

    def __init__(self, section: Any) -> None:
        self.embeds = section.reads
        self._low, self._high = section.low, section.high
        self._reduce = np.max if section.reduce == "max" else np.mean

    def examine(self, case: Case) -> Fixed:
        if not case.real:
            return Fixed([Finding(None, True)] * len(case.samples))
        cosines = case.sample_vectors[self.embeds] @ case.real_vectors[self.embeds].T
        scores = self._reduce(np.clip(cosines, -1.0, 1.0), axis=1)
        return Fixed([Finding(score, self._low <= score <= self._high) for score in map(float, scores)])
