"""Adversarial validation: a sample that a classifier can tell from real ones is not what users write."""

from __future__ import annotations

from typing import Any

import numpy as np

from untether.clients.filters.case import Case, Finding, Fixed


class Adversarial:
    """The share of real samples that look no more real, `low` at least, to a logistic regression on unit vectors.

    Real are the user's own samples of the task and those of other users (`case.beside.others`: disjoint ones, the same
    for every device, so that no device's verdict depends on another's). Synthetic are the user's candidates. Both are
    cut into `folds` parts, and each part is judged by a classifier that learned from the others; a rank among real
    samples that it did not see either, not a probability, as few candidates stand against many real samples. With fewer
    than two candidates, or fewer real samples than parts, there is no score, and samples pass.
    """

    reads_others = True

    def __init__(self, section: Any) -> None:
        self.embeds = section.reads
        self._low, self._folds = section.low, section.folds

    def examine(self, case: Case) -> Fixed:
        made = case.sample_vectors[self.embeds]
        parts = [case.real_vectors[self.embeds], case.other_vectors.get(self.embeds)]
        real = [part for part in parts if part is not None and len(part)]
        folds = min(self._folds, len(made))
        if folds < 2 or sum(map(len, real)) < folds:
            return Fixed([Finding(None, True)] * len(made))
        scores = out_of_fold(np.concatenate(real), made, folds)
        return Fixed([Finding(score, score >= self._low) for score in map(float, scores)])


def out_of_fold(real: np.ndarray, made: np.ndarray, folds: int) -> np.ndarray:
    """Returns for each of `made` `[samples, dim]`, the share of the held-out `real` `[real, dim]` that look no more
    real, `[samples]`. Row i of either is in part i mod `folds`, and judged by a classifier of the other parts.
    """
    from sklearn.linear_model import LogisticRegression  # late: it takes a second to import

    real, made = real.astype(np.float64), made.astype(np.float64)
    scores, part, among = np.empty(len(made)), np.arange(len(made)) % folds, np.arange(len(real)) % folds
    for fold in range(folds):
        known, seen = real[among != fold], made[part != fold]
        labels = np.arange(len(known) + len(seen)) < len(known)
        classifier = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
        classifier.fit(np.concatenate([known, seen]), labels)
        ranks = np.sort(classifier.decision_function(real[among == fold]))
        places = np.searchsorted(ranks, classifier.decision_function(made[part == fold]), side="right")
        scores[part == fold] = places / len(ranks)
    return scores
