"""The rows of summary.json, from tables small enough to work out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.coverage import Fleet, measure
from untether.sim.core.seeding import generator
from untether.sim.evaluation.metrics import corpus_score
from untether.sim.evaluation.resampling import cluster_interval, sign_flip_p
from untether.sim.evaluation.statistics import default_contrasts, summarize, training_costs

KEYS = (
    "task arm metric reference mean ci_low ci_high diff diff_ci_low diff_ci_high wins ties losses p p_holm n_users "
    "n_clusters n_queries steps tokens"
).split()


def answers(arm: str, users: dict[str, list[tuple[str, str]]], task: str = "LaMP_2N", seed: int = 1) -> list[dict]:
    """Rows of predictions: user -> [(prediction, gold), ...]."""
    return [
        {
            "seed": seed, "round": 0, "device_id": f"d-{user}", "user_id": user, "arm": arm, "task": task,
            "query_id": f"{user}-{place}", "prediction": prediction, "gold": gold, "score": None, "outcome": "ok",
        }
        for user, pairs in users.items()
        for place, (prediction, gold) in enumerate(pairs)
    ]  # fmt: skip


def marks(right: dict[str, list[int]]) -> dict[str, list[tuple[str, str]]]:
    """Users with answers that are right (1) or wrong (0)."""
    return {user: [("sports" if mark else "crime", "sports") for mark in each] for user, each in right.items()}


def stars(errors: dict[str, list[int]]) -> dict[str, list[tuple[str, str]]]:
    """Users with ratings that miss a gold of 1 by so many stars."""
    return {user: [(str(1 + error), "1") for error in each] for user, each in errors.items()}


def pick(rows: list[dict], arm: str, metric: str, reference: str | None = None, task: str | None = None) -> dict:
    [row] = [
        row
        for row in rows
        if (row["arm"], row["metric"], row["reference"]) == (arm, metric, reference) and task in (None, row["task"])
    ]
    return row


def test_users_weigh_the_same_whatever_their_number_of_queries():
    rows = summarize(pd.DataFrame(answers("frozen", marks({"a": [1, 1, 1, 0], "b": [0]}))))
    row = pick(rows, "frozen", "accuracy")
    assert (row["mean"], row["n_users"], row["n_queries"]) == (0.375, 2, 5)
    # Without a: 0, without b: 0.75; the jackknife's error is 0.375, on the logit's scale 0.375 / (0.375 * 0.625).
    reach = stats.t.ppf(0.975, 1) / 0.625
    middle = math.log(0.375 / 0.625)
    expected = [1 / (1 + math.exp(-(middle + sign * reach))) for sign in (-1, 1)]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected))
    assert pick(rows, "frozen", "macro_f1")["mean"] == pytest.approx(2 * 3 / (2 * 3 + 2))


def test_a_paired_comparison_by_hand():
    """User means .5, 1, 0, 1 against 0, 1, 0, .5: differences .5, 0, 0, .5, mean .25. Of the 16 swaps those of the two
    that differ matter: sums 1, 0, 0, -1, so half of them reach the observed 1.
    """
    frame = pd.DataFrame(
        answers("collaborative", marks({"a": [1, 0], "b": [1], "c": [0], "d": [1, 1]}))
        + answers("frozen", marks({"a": [0, 0], "b": [1], "c": [0], "d": [1, 0]}))
    )
    row = pick(summarize(frame), "collaborative", "accuracy", "frozen")
    assert (row["mean"], row["diff"], row["p"]) == (0.625, 0.25, 0.5)
    assert (row["wins"], row["ties"], row["losses"]) == (2, 2, 0)
    assert (row["n_users"], row["n_queries"]) == (4, 6)
    assert row["p_holm"] is None and row["margin"] is None and row["non_inferior"] is None
    reach = stats.t.ppf(0.975, 3) * np.std([0.5, 0, 0, 0.5], ddof=1) / 2
    assert (row["diff_ci_low"], row["diff_ci_high"]) == pytest.approx((0.25 - reach, 0.25 + reach))


def test_lower_is_better_keeps_the_sign_and_turns_the_wins():
    frame = pd.DataFrame(
        answers("collaborative", stars({"a": [0], "b": [1], "c": [2]}), "LaMP_3")
        + answers("frozen", stars({"a": [4], "b": [2], "c": [0]}), "LaMP_3")
    )
    row = pick(summarize(frame), "collaborative", "mae", "frozen")
    assert (row["mean"], row["diff"]) == (1.0, -1.0)
    assert (row["wins"], row["ties"], row["losses"]) == (2, 0, 1)
    rmse = pick(summarize(frame), "collaborative", "rmse", "frozen")
    assert rmse["mean"] == pytest.approx(math.sqrt(5 / 3))
    assert rmse["diff"] == pytest.approx(math.sqrt(5 / 3) - math.sqrt(20 / 3))
    assert rmse["wins"] is rmse["ties"] is rmse["losses"] is None


def test_macro_f1_swaps_whole_users():
    """Two users, two swaps that matter: (one arm right for a, the other for b) makes every swap as far or further."""
    frame = pd.DataFrame(
        answers("collaborative", marks({"a": [1], "b": [0]})) + answers("frozen", marks({"a": [0], "b": [0]}))
    )
    row = pick(summarize(frame), "collaborative", "macro_f1", "frozen")
    assert row["mean"] == pytest.approx(2 / 3)
    assert row["diff"] == pytest.approx(2 / 3)
    assert row["p"] == 1.0


def test_corpus_metrics_and_their_resampling_agree_with_a_plain_loop():
    rng = generator(0, "plain")
    labels = ["sports", "crime", "women", "no label"]
    users = {
        f"u{i}": [(str(rng.choice(labels)), str(rng.choice(labels[:3]))) for _ in range(rng.integers(1, 5))]
        for i in range(6)
    }
    other = {user: [(str(rng.choice(labels)), gold) for _, gold in pairs] for user, pairs in users.items()}
    frame = pd.DataFrame(answers("collaborative", users) + answers("frozen", other))
    rows = summarize(frame, seed=3)

    def f1(arm: dict, names: list[str]) -> float:
        return corpus_score("LaMP_2N", *zip(*(pair for name in names for pair in arm[name]), strict=True))["macro_f1"]

    names = list(users)
    row = pick(rows, "collaborative", "macro_f1", "frozen")
    assert row["diff"] == pytest.approx(f1(users, names) - f1(other, names))
    without = [[name for name in names if name != left_out] for left_out in names]
    values = np.array([f1(users, some) - f1(other, some) for some in without])
    reach = stats.t.ppf(0.975, 5) * math.sqrt(5 / 6 * np.sum((values - values.mean()) ** 2))
    assert (row["diff_ci_low"], row["diff_ci_high"]) == pytest.approx((row["diff"] - reach, row["diff"] + reach))
    reached = 0
    for code in range(64):
        one = {u: (other if code >> i & 1 else users)[u] for i, u in enumerate(names)}
        two = {u: (users if code >> i & 1 else other)[u] for i, u in enumerate(names)}
        reached += abs(f1(one, names) - f1(two, names)) >= abs(row["diff"]) - 1e-12
    assert row["p"] == pytest.approx(reached / 64)


def test_means_agree_with_the_plain_functions():
    rng = generator(1, "plain")
    one, two = ({f"u{i:02}": list(rng.integers(0, 5, 4)) for i in range(30)} for _ in range(2))
    frame = pd.DataFrame(answers("collaborative", stars(one), "LaMP_3") + answers("placebo", stars(two), "LaMP_3"))
    row = pick(summarize(frame, seed=5), "collaborative", "mae", "placebo")
    apart = [np.mean(one[user]) - np.mean(two[user]) for user in sorted(one)]
    assert row["diff"] == pytest.approx(np.mean(apart))
    assert (row["diff_ci_low"], row["diff_ci_high"]) == pytest.approx(cluster_interval(apart))
    assert row["p"] == pytest.approx(sign_flip_p(apart, generator(9, "other draw")), abs=0.02)


def test_only_queries_that_both_arms_answered_are_compared():
    frame = pd.DataFrame(
        answers("collaborative", marks({"a": [1, 1], "b": [1], "only": [0]}))
        + answers("frozen", marks({"a": [0], "b": [1], "other": [1]}))
    )
    rows = summarize(frame)
    row = pick(rows, "collaborative", "accuracy", "frozen")
    assert (row["n_users"], row["n_queries"], row["mean"], row["diff"]) == (2, 2, 1.0, 0.5)
    assert pick(rows, "collaborative", "accuracy")["n_users"] == 3


def test_arms_without_a_common_query_and_single_users_give_no_interval():
    frame = pd.DataFrame(answers("collaborative", marks({"a": [1]})) + answers("frozen", marks({"b": [1]})))
    rows = summarize(frame)
    row = pick(rows, "collaborative", "accuracy", "frozen")
    assert row["n_users"] == 0
    assert all(row[key] is None for key in ("mean", "ci_low", "diff", "diff_ci_low", "p"))
    alone = pick(rows, "collaborative", "accuracy")
    assert (alone["mean"], alone["ci_low"], alone["ci_high"]) == (1.0, None, None)


def test_seeds_are_pooled_and_the_same_name_in_two_seeds_is_two_users():
    frame = pd.DataFrame(answers("frozen", marks({"a": [1]}), seed=1) + answers("frozen", marks({"a": [0]}), seed=2))
    row = pick(summarize(frame), "frozen", "accuracy")
    assert (row["mean"], row["n_users"], row["n_queries"]) == (0.5, 2, 2)
    assert (row["n_clusters"], row["ci_low"]) == (1, None), "one person, whatever seed drew them"


def test_rounds_are_averaged_to_a_user_and_a_query_is_counted_once():
    first = answers("frozen", marks({"a": [1], "b": [1]}))
    again = [row | {"round": 1, "prediction": "crime"} for row in first if row["user_id"] == "a"]
    row = pick(summarize(pd.DataFrame(first + again)), "frozen", "accuracy")
    assert (row["mean"], row["n_users"], row["n_queries"]) == (0.75, 2, 2)


def test_silence_is_an_answer():
    rows = answers("cloud", {"a": [("sports", "sports"), (None, "sports")]})
    assert pick(summarize(pd.DataFrame(rows)), "cloud", "accuracy")["mean"] == 0.5


def test_holm_is_over_tasks_times_primary_contrasts_on_the_primary_metric():
    """Twelve users, one arm right for all: p = 2 / 4096 for each of two tasks x two contrasts; Holm: times 4."""
    users = [f"u{i:02}" for i in range(12)]
    rows = []
    for task, good, bad in (("LaMP_2N", marks({u: [1] for u in users}), marks({u: [0] for u in users})),
                            ("LaMP_3", stars({u: [0] for u in users}), stars({u: [2] for u in users}))):  # fmt: skip
        rows += answers("collaborative", good, task)
        for arm in ("local_matched", "placebo", "frozen"):
            rows += answers(arm, bad, task)
    rows = summarize(pd.DataFrame(rows))
    tested = [row for row in rows if row["p_holm"] is not None]
    assert {(row["task"], row["metric"], row["reference"]) for row in tested} == {
        (task, metric, reference)
        for task, metric in (("LaMP_2N", "accuracy"), ("LaMP_3", "mae"))
        for reference in ("local_matched", "placebo")
    }
    assert {row["p"] for row in tested} == {2 / 4096}
    assert {row["p_holm"] for row in tested} == {8 / 4096}
    assert pick(rows, "local_matched", "accuracy", "frozen")["p"] == 1.0


@pytest.mark.parametrize(("margin", "verdict"), [(0.53, True), (0.52, False)])
def test_not_worse_means_that_the_interval_lies_above_the_margin(margin, verdict):
    """Four users, one of them worse by half: -0.125, standard error 0.125, times Student's 3.182: from -0.523."""
    frame = pd.DataFrame(
        answers("collaborative", marks({"a": [1, 1], "b": [1], "c": [1], "d": [0, 1]}))
        + answers("cloud", marks({"a": [1, 1], "b": [1], "c": [1], "d": [1, 1]}))
    )
    rows = summarize(frame, margin=margin)
    row = pick(rows, "collaborative", "accuracy", "cloud")
    assert row["diff"] == -0.125
    assert (row["diff_ci_low"], row["diff_ci_high"]) == pytest.approx((-0.5228, 0.2728), abs=1e-4)
    assert (row["margin"], row["non_inferior"]) == (margin, verdict)
    assert pick(rows, "collaborative", "macro_f1", "cloud")["non_inferior"] is None


def test_not_worse_where_lower_is_better_is_judged_in_stars():
    frame = pd.DataFrame(
        answers("collaborative", stars({"a": [1], "b": [1]}), "LaMP_3")
        + answers("cloud", stars({"a": [0], "b": [0]}), "LaMP_3")
    )
    for margin_stars, verdict in ((1.1, True), (0.9, False)):
        row = pick(summarize(frame, margin=1.0, margin_stars=margin_stars), "collaborative", "mae", "cloud")
        assert (row["margin"], row["non_inferior"]) == (margin_stars, verdict)


def test_which_comparisons_are_made():
    arms = ["frozen", "local", "local_matched", "placebo", "collaborative", "cloud"]
    assert default_contrasts(arms) == [
        ("collaborative", "local_matched"), ("collaborative", "placebo"), ("collaborative", "cloud"),
        ("local", "frozen"), ("local_matched", "frozen"), ("placebo", "frozen"), ("collaborative", "frozen"),
        ("cloud", "frozen"),
    ]  # fmt: skip
    frame = pd.DataFrame([row for arm in ("local", "cloud") for row in answers(arm, marks({"a": [1]}))])
    made = summarize(frame, contrasts=[("local", "cloud"), ("local", "shared")])
    assert {(row["arm"], row["reference"]) for row in made} == {("local", None), ("cloud", None), ("local", "cloud")}


def test_steps_and_tokens_of_a_device():
    """d-a: 3 steps and 30 tokens in round 0, 1 and 8 in round 1; d-b: 9 and 180, and one that was given up: in all
    13 steps and 218 tokens, over two devices. Where numbers come from is for tests/test_columns.py to say.
    """
    done = [("train", 3, 30), ("train", 1, 8), ("train", 9, 180), ("train", None, None), ("augment", None, 1000)]
    events = pd.DataFrame([(kind, "collaborative", s, t) for kind, s, t in done],
                          columns=["kind", "arm", "steps", "tokens_in"])  # fmt: skip
    frame = pd.DataFrame(
        [row for arm in ("collaborative", "frozen", "rag_adapter") for row in answers(arm, marks({"a": [1], "b": [0]}))]
    )
    assert training_costs(events, frame) == {"collaborative": (6.5, 109.0), "rag_adapter": (6.5, 109.0)}
    rows = summarize(frame, events)
    assert {(row["arm"], row["steps"], row["tokens"]) for row in rows} == {
        ("collaborative", 6.5, 109.0), ("rag_adapter", 6.5, 109.0), ("frozen", 0.0, 0.0),
    }  # fmt: skip


def test_rows_are_json_with_the_contracts_keys_and_do_not_depend_on_the_tables_order():
    rng = generator(2, "plain")
    rows = []
    for arm in ("collaborative", "local_matched", "cloud", "frozen"):
        rows += answers(arm, marks({f"u{i:02}": list(rng.integers(0, 2, 3)) for i in range(20)}))
    frame = pd.DataFrame(rows)
    made = summarize(frame, seed=1, resamples=500)
    assert all(set(KEYS) <= set(row) for row in made)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert summarize(frame.sample(frac=1, random_state=0), seed=1, resamples=500) == made
    assert summarize(frame, seed=2, resamples=500) != made


def test_a_perfect_classifier_has_one_and_no_doubt():
    """Each user has labels of their own, so every resample lacks some; the other arm is never right."""
    labels = ["sports", "crime", "women", "politics", "travel", "business"]
    right = {f"u{i}": [(label, label), (labels[0], labels[0])] for i, label in enumerate(labels)}
    wrong = {user: [("parents", gold) for _, gold in pairs] for user, pairs in right.items()}
    rows = summarize(pd.DataFrame(answers("collaborative", right) + answers("frozen", wrong)))
    for metric in ("accuracy", "macro_f1"):
        row = pick(rows, "collaborative", metric)
        assert (row["mean"], row["ci_low"], row["ci_high"]) == (1.0, 1.0, 1.0)
        row = pick(rows, "collaborative", metric, "frozen")
        assert (row["diff"], row["diff_ci_low"], row["diff_ci_high"], row["p"]) == (1.0, 1.0, 1.0, 2 / 64)


def in_clusters(rows: list[dict], cluster: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows).assign(cluster=lambda frame: frame["user_id"].map(cluster))


def test_users_of_a_cluster_are_left_out_and_swapped_together_by_hand():
    """Differences 1, 1 in cluster x, 0 in y, 1 in z: mean 3/4. Without x: 1/2, y: 1, z: 2/3; their mean 13/18 and
    squared distances (16 + 25 + 1) / 324, times 2/3. Of 8 swaps, 4 reach 3: those that swap both x and z, or neither.
    """
    rows = answers("collaborative", marks({"a": [1], "b": [1], "c": [0], "d": [1]}))
    rows += answers("frozen", marks({user: [0] for user in "abcd"}))
    frame = in_clusters(rows, dict(zip("abcd", "xxyz", strict=True)))
    row = pick(summarize(frame), "collaborative", "accuracy", "frozen")
    assert (row["n_users"], row["n_clusters"], row["diff"], row["p"]) == (4, 3, 0.75, 0.5)
    reach = stats.t.ppf(0.975, 2) * math.sqrt(2 / 3 * 42 / 324)
    assert (row["diff_ci_low"], row["diff_ci_high"]) == pytest.approx((0.75 - reach, 0.75 + reach))
    assert (row["wins"], row["ties"], row["losses"]) == (3, 1, 0), "counted by user all the same"


def test_a_cluster_is_one_over_all_seeds_and_a_user_without_one_is_their_own():
    rows = answers("frozen", marks({"a": [1], "b": [0]}), seed=1)
    rows += answers("frozen", marks({"c": [1], "d": [0]}), seed=2)
    frame = in_clusters(rows, {"a": "x", "c": "x", "b": None, "d": None})
    row = pick(summarize(frame), "frozen", "accuracy")
    assert (row["n_users"], row["n_clusters"]) == (4, 3)
    assert pick(summarize(frame.drop(columns="cluster")), "frozen", "accuracy")["n_clusters"] == 4


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.lists(st.integers(0, 4), min_size=1, max_size=3)), min_size=2),
    st.integers(1, 4),
)
def test_copies_of_a_cluster_add_users_and_nothing_to_what_is_known(users, copies):
    """A cluster's users many times over leave every interval as it was: what counts is how many clusters there are."""

    def rows(times: int) -> pd.DataFrame:
        named = {f"u{i}-{k}": stars_of for i, (_, stars_of) in enumerate(users) for k in range(times)}
        cluster = {f"u{i}-{k}": name for i, (name, _) in enumerate(users) for k in range(times)}
        return in_clusters(answers("frozen", stars(named), "LaMP_3"), cluster)

    for once, often in zip(summarize(rows(1)), summarize(rows(copies)), strict=True):
        assert once["n_clusters"] == often["n_clusters"]
        assert once["mean"] == pytest.approx(often["mean"])
        if once["ci_low"] is not None:
            ends = (often["ci_low"], often["ci_high"])
            assert (once["ci_low"], once["ci_high"]) == pytest.approx(ends)
            assert 0 <= once["ci_low"] <= once["mean"] + 1e-12 and once["mean"] <= once["ci_high"] + 1e-12


def test_intervals_hold_the_truth_and_p_holds_its_size_where_users_are_alike():
    """`bench.coverage`, made small: 200 replications have a standard error of 1.5 points."""
    found = measure(Fleet(60, True), 200, ["LaMP_2N"], resamples=200)
    for name, share in found.items():
        low, high = (0.01, 0.10) if name.endswith(" p") else (0.91, 0.99)
        assert low <= share <= high, f"{name}: {share}"


def test_nothing_is_said_about_a_cloud_that_never_answered():
    users = {name: [1, 0] for name in "abcdef"}
    silent = [row | {"outcome": "no_answer", "prediction": ""} for row in answers("cloud", marks(users))]
    rows = summarize(pd.DataFrame([*answers("collaborative", marks(users)), *silent]))
    row = pick(rows, "collaborative", "accuracy", "cloud")
    assert [row[name] for name in ("diff", "diff_ci_low", "wins", "p", "margin", "non_inferior")] == [None] * 6
    silent[0] = silent[0] | {"outcome": "ok"}
    rows = summarize(pd.DataFrame([*answers("collaborative", marks(users)), *silent]))
    assert pick(rows, "collaborative", "accuracy", "cloud")["non_inferior"] is True
