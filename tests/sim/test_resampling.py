"""Intervals, p-values and Holm's correction: worked by hand, against SciPy, and for what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sim.resampling import bootstrap_interval, bootstrap_totals, holm, sign_flip_p, swap_totals
from sim.seeding import generator

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


def test_bootstrap_interval_agrees_with_scipy():
    values = generator(2, "sample").gamma(2.0, 1.0, 25)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0), n_resamples=20_000
    )
    low, high = bootstrap_interval(values, generator(0, "boot"), 20_000)
    width = high - low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)


def test_the_bootstrap_draws_as_many_users_as_there_are_and_all_columns_alike():
    per_user = np.stack([np.arange(5.0), np.ones(5), 3 * np.arange(5.0)], axis=1)
    totals = bootstrap_totals(per_user, generator(0, "boot"), 2_000)
    assert totals.shape == (2_000, 3)
    assert np.all(totals[:, 1] == 5)
    assert np.allclose(totals[:, 2], 3 * totals[:, 0])
    assert totals[:, 0].mean() == pytest.approx(10, abs=0.3)


def test_chunks_change_nothing_but_the_memory_used(monkeypatch):
    values = np.ones((50, 1))
    monkeypatch.setattr("sim.resampling._CHUNK_NUMBERS", 130)
    assert np.all(bootstrap_totals(values, generator(0, "boot"), 101) == 50)
    moved, _ = swap_totals(values, generator(0, "flip"), 101)
    assert moved.shape == (101, 1) and moved.min() < 25 < moved.max()


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    """95% nominal; the percentile bootstrap of 40 normal values covers a little less (near 0.94 by its known size)."""
    rng = generator(3, "coverage")
    samples = rng.normal(1.0, 2.0, (400, 40))
    intervals = [bootstrap_interval(sample, rng, 500) for sample in samples]
    assert 0.90 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.98


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
    with pytest.raises(ValueError, match="no users"):
        bootstrap_interval([], RNG)
