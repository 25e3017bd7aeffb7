"""Adversarial validation: a sample that a classifier can tell from real ones is not what users write."""

from __future__ import annotations

from typing import Any

import numpy as np

from untether.clients.filters.case import Case, Finding, Fixed


class Adversarial:
    """The probability of being real, `low` at least, by a logistic regression on unit vectors.

    Real are the user's own samples of the task and those of other users (`case.beside.others`: disjoint ones, the same
    for every device, so that no device's verdict depends on another's). Synthetic are the user's candidates, in `folds`
    parts: each part is judged by a classifier that learned from the others. Both kinds weigh the same. With fewer than
    two candidates, or nothing real, there is no score, and samples pass.
    """

    reads_others = True

    def __init__(self, section: Any) -> None:
        self.embeds = section.reads
        self._low, self._folds = section.low, section.folds

    def examine(self, case: Case) -> Fixed:
        made = case.sample_vectors[self.embeds]
        parts = [case.real_vectors[self.embeds], case.other_vectors.get(self.embeds)]
        real = [part for part in parts if part is not None and len(part)]
        if len(made) < 2 or not real:
            return Fixed([Finding(None, True)] * len(made))
        scores = out_of_fold(np.concatenate(real), made, min(self._folds, len(made)))
        return Fixed([Finding(score, score >= self._low) for score in map(float, scores)])


def out_of_fold(real: np.ndarray, made: np.ndarray, folds: int) -> np.ndarray:
    """The probability that each of `made` `[samples, dim]` is one of `real` `[real, dim]`, `[samples]`: sample i is in
    part i mod `folds`, and judged by a classifier of the other parts.
    """
    from sklearn.linear_model import LogisticRegression  # late: it takes a second to import

    scores, part = np.empty(len(made)), np.arange(len(made)) % folds
    for fold in range(folds):
        seen = made[part != fold]
        vectors = np.concatenate([real, seen]).astype(np.float64)
        labels = np.arange(len(vectors)) < len(real)
        classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(vectors, labels)
        scores[part == fold] = classifier.predict_proba(made[part == fold].astype(np.float64))[:, 1]
    return scores
