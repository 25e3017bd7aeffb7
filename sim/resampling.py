"""Resampling over users: bootstrap intervals, permutation p-values and Holm's correction, for any score of sums.

A score here is a function of per-user sums: the mean of users (sum of means / number of users), RMSE (root of squared
errors / answers), macro-F1 (of counts). Users are resampled whole, so the answers of one user stay together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CHUNK_NUMBERS = 4_000_000
RELATIVE_TIE = 1e-9


def bootstrap_totals(per_user: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Sums over users drawn with replacement: [users, columns] -> [resamples, columns]. All columns see one draw."""
    users = len(per_user)
    totals = np.empty((resamples, per_user.shape[1]))
    for start, stop in _chunks(resamples, users):
        rows = stop - start
        drawn = rng.integers(0, users, (rows, users)) + users * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users)
        totals[start:stop] = times.astype(float) @ per_user
    return totals


def swap_totals(difference: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[np.ndarray, bool]:
    """What moves from one arm's sums to the other's when each user's two arms are swapped at random.

    [users, columns] of (arm - reference) -> [swaps, columns], and whether these are all swaps there are (2 ** users,
    where that is no more than `resamples`) or `resamples` random ones.
    """
    users = len(difference)
    if 2**users <= resamples:
        swapped = (np.arange(2**users)[:, None] >> np.arange(users)) & 1
        return swapped.astype(float) @ difference, True
    moved = np.empty((resamples, difference.shape[1]))
    for start, stop in _chunks(resamples, users):
        bits = np.frombuffer(rng.bytes(-(-(stop - start) * users // 8)), dtype=np.uint8)
        swapped = np.unpackbits(bits)[: (stop - start) * users].reshape(stop - start, users)
        moved[start:stop] = swapped.astype(float) @ difference
    return moved, False


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)


def permutation_p(permuted: np.ndarray, observed: float, exact: bool) -> float:
    """Two-sided p: the share of permutations at least as far from zero as the observed difference.

    Random permutations count the observed one among them (Phipson and Smyth, 2010), so p is never 0.
    """
    reach = abs(observed) - RELATIVE_TIE * max(1.0, abs(observed))
    extreme = int(np.count_nonzero(np.abs(permuted) >= reach))
    return extreme / len(permuted) if exact else (extreme + 1) / (len(permuted) + 1)


def bootstrap_interval(
    values: Sequence[float], rng: np.random.Generator, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one value a user. Raises ValueError for none."""
    per_user = np.asarray(values, dtype=float).reshape(-1, 1)
    if not len(per_user):
        raise ValueError("no users to resample")
    return interval(bootstrap_totals(per_user, rng, resamples)[:, 0] / len(per_user), confidence)


def sign_flip_p(differences: Sequence[float], rng: np.random.Generator, resamples: int = 10_000) -> float:
    """Two-sided sign-flip p of the mean of paired differences, one a user. Exact where 2 ** users <= `resamples`."""
    per_user = np.asarray(differences, dtype=float).reshape(-1, 1)
    if not len(per_user):
        raise ValueError("no users to compare")
    moved, exact = swap_totals(per_user, rng, resamples)
    return permutation_p(per_user.mean() - 2 * moved[:, 0] / len(per_user), per_user.mean(), exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, running = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def _chunks(resamples: int, users: int) -> list[tuple[int, int]]:
    size = max(1, _CHUNK_NUMBERS // max(1, users))
    return [(start, min(start + size, resamples)) for start in range(0, resamples, size)]
