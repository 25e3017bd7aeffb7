"""Intervals, p-values and Holm's correction: worked by hand, against SciPy, and for what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from untether.sim.core.seeding import generator
from untether.sim.evaluation.resampling import (
    AMOUNT,
    ANY,
    SHARE,
    cluster_interval,
    drawn_clusters,
    holm,
    jackknife_interval,
    sign_flip_p,
    swap_totals,
    widened_tails,
)

RNG = generator(0, "draws of the tests")
DIFFERENCES = st.lists(st.integers(-8, 8).map(lambda value: value / 4), min_size=2, max_size=9)


def test_exact_sign_flip_by_hand():
    """(1, 2, 3) sums to 6; of the 8 signings only +++ and --- reach it: 2/8. (1, -1) sums to 0, which all reach."""
    assert sign_flip_p([1.0, 2.0, 3.0], RNG) == 2 / 8
    assert sign_flip_p([1.0, -1.0], RNG) == 1.0
    assert sign_flip_p([0.0, 0.0, 0.0], RNG) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3, 0.0], RNG) == 2 / 8


@settings(max_examples=30)
@given(DIFFERENCES)
def test_exact_sign_flip_agrees_with_scipy(differences):
    zeros = np.zeros(len(differences))
    expected = stats.permutation_test(
        (np.array(differences), zeros),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=10_000,
        vectorized=True,
    )
    assert sign_flip_p(differences, RNG) == pytest.approx(expected.pvalue, abs=1e-12)


def test_random_sign_flip_agrees_with_scipy_where_there_are_too_many_to_count():
    differences = generator(1, "sample").normal(0.25, 1.0, 40)
    expected = stats.permutation_test(
        (differences, np.zeros(40)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    p = sign_flip_p(differences, generator(0, "flip"), 20_000)
    assert 0.02 < p < 0.9
    assert p == pytest.approx(expected.pvalue, abs=0.015)


def test_random_sign_flip_is_never_zero():
    assert sign_flip_p([1.0] * 30, generator(0, "flip"), 999) == 1 / 1000


def test_swaps_are_all_there_are_or_as_many_as_asked():
    moved, exact = swap_totals(np.array([[1.0], [10.0]]), RNG, 4)
    assert exact and sorted(moved[:, 0]) == [0, 1, 10, 11]
    moved, exact = swap_totals(np.array([[1.0], [10.0]]), RNG, 3)
    assert not exact and len(moved) == 3


def test_the_signs_of_a_cluster_flip_together():
    """(1, 2 | 3): of 4 signings +++ and --- reach 6."""
    assert sign_flip_p([1.0, 2.0, 3.0], RNG, clusters=["a", "a", "b"]) == 2 / 4
    assert sign_flip_p([1.0, 2.0, 3.0], RNG, clusters=["a", "b", "c"]) == sign_flip_p([1.0, 2.0, 3.0], RNG)


def test_without_clusters_and_bounds_it_is_students_interval():
    values = generator(2, "sample").gamma(2.0, 1.0, 25)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert cluster_interval(values) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_clusters_of_one_size_is_that_of_their_means():
    values = generator(5, "sample").normal(size=(8, 3))
    assert cluster_interval(values.ravel(), np.repeat(np.arange(8), 3)) == pytest.approx(
        cluster_interval(values.mean(axis=1))
    )


def test_scales_by_hand():
    """Values 0.2 and 0.6 without one of two: error 0.2, of their logarithms log(3) / 2. An amount that one cluster
    alone makes has no logarithm without it: the error is then divided by the estimate.
    """
    without, reach = np.array([0.2, 0.6]), stats.t.ppf(0.975, 1) * 0.2
    assert jackknife_interval(0.4, without, ANY) == pytest.approx((0.4 - reach, 0.4 + reach))
    factor = np.exp(stats.t.ppf(0.975, 1) * np.log(3) / 2)
    assert jackknife_interval(0.4, without, AMOUNT) == pytest.approx((0.4 / factor, 0.4 * factor))
    factor = np.exp(stats.t.ppf(0.975, 1) * 0.4 / 0.4)
    assert jackknife_interval(0.4, np.array([0.0, 0.8]), AMOUNT) == pytest.approx((0.4 / factor, 0.4 * factor))
    odds = 0.4 / 0.6 * np.exp(np.array([-1, 1]) * reach / 0.24)
    assert jackknife_interval(0.4, without, SHARE) == pytest.approx(tuple(odds / (1 + odds)))
    with pytest.raises(ValueError, match="scale"):
        jackknife_interval(0.4, without, (0.0, 2.0))


@given(st.lists(st.integers(0, 4).map(lambda value: value / 4), min_size=2, max_size=12))
def test_an_interval_is_around_the_mean_and_within_the_bounds(values):
    for bounds in (SHARE, AMOUNT):
        low, high = cluster_interval(values, bounds=bounds)
        assert bounds[0] <= low <= np.mean(values) + 1e-12 and np.mean(values) <= high + 1e-12 and high <= bounds[1]
    if len(set(values)) == 1:
        assert cluster_interval(values, bounds=SHARE) == (values[0], values[0])


def test_the_bootstrap_draws_as_many_clusters_as_there_are_and_widens_its_tails_for_few():
    assert np.all(drawn_clusters(5, generator(0, "boot"), 200).sum(1) == 5)
    low, high = widened_tails(10)
    assert low == pytest.approx(stats.norm.cdf(-np.sqrt(10 / 9) * stats.t.ppf(0.975, 9))) and low < 0.025
    assert low + high == 1 and widened_tails(100_000)[0] == pytest.approx(0.025, abs=1e-4)


def test_chunks_change_nothing_but_the_memory_used(monkeypatch):
    values = np.ones((50, 1))
    monkeypatch.setattr("untether.sim.evaluation.resampling._CHUNK_NUMBERS", 130)
    moved, _ = swap_totals(values, generator(0, "flip"), 101)
    assert moved.shape == (101, 1) and moved.min() < 25 < moved.max()


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    """Student's is exact for normal values; 1,000 samples have a standard error of 0.7 points."""
    samples = generator(3, "coverage").normal(1.0, 2.0, (1000, 12))
    intervals = [cluster_interval(sample) for sample in samples]
    assert np.mean([low <= 1.0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_p_is_small_no_more_often_than_it_says_when_nothing_differs():
    rng = generator(4, "size")
    p_values = [sign_flip_p(sample, rng, 500) for sample in rng.normal(0.0, 1.0, (400, 20))]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.085
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_holm_by_hand():
    """Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, made monotone: .04 .06 .06 .06."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.3]) == [0.3]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_the_raw_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for raw, after in zip(p_values, adjusted, strict=True):
        assert raw <= after <= min(1.0, raw * len(p_values)) + 1e-12
    assert [x for _, x in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_no_users_are_an_error():
    with pytest.raises(ValueError, match="no users"):
        sign_flip_p([], RNG)
    with pytest.raises(ValueError, match="needs two"):
        cluster_interval([])
    with pytest.raises(ValueError, match="needs two"):
        cluster_interval([1.0, 2.0], ["a", "a"])
