"""Intervals and p-values over clusters of users: jackknife, permutations and Holm's correction, for scores of sums.

A score here is a function of per-cluster sums: the mean of users (sum of means / number of users), RMSE (root of
squared errors / answers), macro-F1 (of counts). Users who are alike for one reason make one cluster (see
`User.cluster`); any other user is a cluster alone. Clusters are left out, drawn and swapped whole, so any dependence
between the answers of one user or of one cluster is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

_CHUNK_NUMBERS = 4_000_000
RELATIVE_TIE = 1e-9

ANY = (-math.inf, math.inf)
"""Bounds of a difference: none."""
SHARE = (0.0, 1.0)
"""Bounds of accuracy, F1, ROUGE, and shares of users."""
AMOUNT = (0.0, math.inf)
"""Bounds of MAE, RMSE and costs."""


def without_each(per_cluster: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns the score with each cluster left out in turn: sums [clusters, columns] -> [clusters]."""
    return score(per_cluster.sum(0) - per_cluster)


def jackknife_interval(
    estimate: float, without: np.ndarray, bounds: tuple[float, float] = ANY, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns the interval of a score from its values without each cluster (`without_each`), at least two.

    The standard error is the jackknife's, over clusters; it is multiplied by Student's t with one degree of freedom
    less than there are clusters (Bell and McCaffrey, 2002; MacKinnon, Nielsen and Webb, 2023). It is computed on the
    scale of the logit for `SHARE` and of the logarithm for `AMOUNT`, so that an interval near a bound leans away from
    it and never crosses it. `python -m bench.coverage` measures its coverage.

    Args:
        estimate: The score of all clusters.
        without: [clusters] The score without each.
        bounds: `ANY`, `SHARE` or `AMOUNT`.
        confidence: Of the interval.
    """
    clusters = len(without)
    student = student_t(clusters - 1, confidence)
    reach = student * _error(without)
    low, high = bounds
    if reach == 0 or bounds == ANY or not low < estimate < high:
        return max(low, estimate - reach), min(high, estimate + reach)
    if bounds == AMOUNT:
        reach = student * _error(np.log(without)) if without.min() > 0 else reach / estimate
        factor = math.exp(min(reach, 700.0))
        return estimate / factor, estimate * factor
    if bounds != SHARE:
        raise ValueError(f"no scale for the bounds {bounds}")
    middle, reach = special.logit(estimate), reach / (estimate * (1 - estimate))
    return float(special.expit(middle - reach)), float(special.expit(middle + reach))


def _error(without: np.ndarray) -> float:
    clusters = len(without)
    return math.sqrt((clusters - 1) / clusters * float(np.sum((without - without.mean()) ** 2)))


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """Returns the two-sided quantile of Student's t."""
    return float(special.stdtrit(freedom, (1 + confidence) / 2))


def cluster_interval(
    values: Sequence[float], clusters: Sequence[object] | None = None, bounds: tuple[float, float] = ANY
) -> tuple[float, float]:
    """Returns the 95% interval of the mean of one value a user.

    Where every user is a cluster, and without bounds, this is Student's interval of a mean.

    Args:
        values: One a user.
        clusters: The cluster of each user; None: every user is one.
        bounds: `ANY`, `SHARE` or `AMOUNT`.

    Raises:
        ValueError: There are fewer than two clusters.
    """
    per_user = np.asarray(values, dtype=float)
    of = np.arange(len(per_user)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = np.bincount(of).astype(float)
    if len(count) < 2:
        raise ValueError(f"{len(count)} clusters of users: an interval needs two")
    sums = np.stack([np.bincount(of, per_user), count], axis=1)
    without = without_each(sums, lambda total: total[:, 0] / total[:, 1])
    return jackknife_interval(float(per_user.mean()), without, bounds)


def drawn_clusters(clusters: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Returns how often each cluster is drawn when they are resampled with replacement: [resamples, clusters]."""
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), resamples)


def widened_tails(clusters: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the quantiles of a bootstrap over clusters that make its interval, for scores that have no jackknife.

    This is the expanded percentile interval, which is as wide as Student's where a score is a mean (Hesterberg, 2015,
    section 4.2).
    """
    tail = float(special.ndtr(-math.sqrt(clusters / (clusters - 1)) * student_t(clusters - 1, confidence)))
    return tail, 1 - tail


def swap_totals(difference: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[np.ndarray, bool]:
    """Returns the change of one arm's sums when each cluster's two arms are swapped at random.

    Args:
        difference: [clusters, columns] of (arm - reference).
        rng: Draws the swaps.
        resamples: Bound on the swaps.

    Returns:
        [swaps, columns], and whether these are all swaps that exist (2 ** clusters, where that is at most `resamples`)
        or `resamples` random ones.
    """
    clusters = len(difference)
    if 2**clusters <= resamples:
        swapped = (np.arange(2**clusters)[:, None] >> np.arange(clusters)) & 1
        return swapped.astype(float) @ difference, True
    moved = np.empty((resamples, difference.shape[1]))
    for start, stop in _chunks(resamples, clusters):
        bits = np.frombuffer(rng.bytes(-(-(stop - start) * clusters // 8)), dtype=np.uint8)
        swapped = np.unpackbits(bits)[: (stop - start) * clusters].reshape(stop - start, clusters)
        moved[start:stop] = swapped.astype(float) @ difference
    return moved, False


def permutation_p(permuted: np.ndarray, observed: float, exact: bool) -> float:
    """Returns the two-sided p: the share of permutations at least as far from zero as the observed difference.

    Random permutations count the observed one among them (Phipson and Smyth, 2010), so p is never 0.
    """
    reach = abs(observed) - RELATIVE_TIE * max(1.0, abs(observed))
    extreme = int(np.count_nonzero(np.abs(permuted) >= reach))
    return extreme / len(permuted) if exact else (extreme + 1) / (len(permuted) + 1)


def sign_flip_p(
    differences: Sequence[float], rng: np.random.Generator, resamples: int = 10_000,
    clusters: Sequence[object] | None = None,
) -> float:  # fmt: skip
    """Returns the two-sided sign-flip p of the mean of paired differences: the signs of a cluster flip together.

    Exact where 2 ** clusters <= `resamples`.

    Args:
        differences: One a user.
        rng: Draws the signs.
        resamples: Bound on the sign flips.
        clusters: The cluster of each user; None: every user is one.
    """
    per_user = np.asarray(differences, dtype=float)
    if not len(per_user):
        raise ValueError("no users to compare")
    of = np.arange(len(per_user)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    moved, exact = swap_totals(np.bincount(of, per_user).reshape(-1, 1), rng, resamples)
    return permutation_p(per_user.mean() - 2 * moved[:, 0] / len(per_user), per_user.mean(), exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's step-down adjusted p-values (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, running = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def _chunks(resamples: int, clusters: int) -> list[tuple[int, int]]:
    size = max(1, _CHUNK_NUMBERS // max(1, clusters))
    return [(start, min(start + size, resamples)) for start in range(0, resamples, size)]
