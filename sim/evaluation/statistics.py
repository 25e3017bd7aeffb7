"""From answers to the rows of `summary.json`: every arm's score, and every comparison between two arms, over users.

Answers are averaged to a user, then users are compared in pairs. A query counts in a comparison only where both arms
answered it (an outcome other than `ok` is an answer: an empty one, scored as such). Several seeds are pooled: a user is
(seed, user_id), and seeds draw disjoint users. Users are not treated as independent: intervals and p-values are over
clusters of users (`clustered`), such as the archetypes of the world, which all seeds share.

`diff` is always arm minus reference, in the metric's own direction; `wins` are users with the better score, so for MAE
a negative `diff` goes with wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from untether.sim.core.seeding import generator
from untether.sim.evaluation.metrics import macro_f1, score
from untether.sim.evaluation.resampling import (
    AMOUNT,
    ANY,
    SHARE,
    holm,
    jackknife_interval,
    permutation_p,
    swap_totals,
    without_each,
)
from untether.sim.experiment.arms import ARMS, CONTRASTS, FLOOR, NON_INFERIORITY, PRIMARY, ordered
from untether.sim.population.tasks import Task, get_task, higher_is_better, unit

_TIE = 1e-12

TableRow = dict[str, object]
ArmPair = tuple[str, str]


def summarize(
    predictions: pd.DataFrame,
    events: pd.DataFrame | None = None,
    contrasts: Sequence[ArmPair] | None = None,
    margin: float = 0.02,
    margin_stars: float = 0.1,
    seed: int = 0,
    resamples: int = 10_000,
) -> list[TableRow]:
    """Returns the rows of `summary.json`.

    For each task, arm and metric there is a row with `reference` None: `mean` over users (macro-F1 and RMSE: over all
    answers) with its interval. For each task, contrast and metric there is a row with the reference: `mean` is the
    arm's on the shared queries, `diff` the paired difference with its interval, and a two-sided p by swapping the arms
    within clusters of users (for a mean that is the sign-flip test; exact for few clusters). Intervals are 95% by the
    jackknife over clusters (`jackknife_interval`), None for fewer than two. `p_holm` is only for `PRIMARY` on the
    primary metric; `margin` and `non_inferior` only for `NON_INFERIORITY` on it; wins, ties and losses only where a
    single user has a score; none of these against a cloud that answered nothing. `steps` and `tokens` are what a device
    trained on average over all rounds.

    The same tables, seed and resamples give the same rows, in whatever order the tables are.

    Args:
        predictions, events: The tables of a run directory.
        contrasts: By default `CONTRASTS` and every other arm against `frozen`; those with an absent arm are left out.
        margin: Of non-inferiority.
        margin_stars: The margin where the metric is in stars.
        seed: Of permutations and resamples.
        resamples: Their number.
    """
    rows: list[TableRow] = []
    costs = training_costs(events, predictions)
    predictions = clustered(predictions)
    for name in sorted(predictions["task"].unique()):
        task = get_task(name)
        limit = margin_stars if unit(task.primary) == "stars" else margin
        comparison = _Comparison(task, predictions[predictions["task"] == name], seed, resamples)
        chosen = default_contrasts(comparison.arms) if contrasts is None else contrasts
        for arm in comparison.arms:
            rows += comparison.arm_rows(arm)
        for arm, reference in chosen:
            if arm in comparison.arms and reference in comparison.arms:
                rows += comparison.contrast_rows(arm, reference, limit)
    family = [row for row in rows if _is_primary(row) and row["p"] is not None]
    for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = adjusted
    for row in rows:
        row["steps"], row["tokens"] = costs.get(row["arm"], (0.0, 0.0))
    return rows


def clustered(predictions: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with `cluster` filled: a user without one is a cluster alone, the same one in all seeds."""
    named = predictions["cluster"] if "cluster" in predictions else pd.Series(None, predictions.index, dtype=object)
    return predictions.assign(cluster=named.where(named.notna(), predictions["user_id"]))


def default_contrasts(arms: Sequence[str]) -> list[ArmPair]:
    """Returns the design's contrasts and every other arm against `frozen`, as far as the arms are present."""
    pairs = dict.fromkeys([*CONTRASTS, *((arm, FLOOR) for arm in arms if arm != FLOOR)])
    return [(arm, reference) for arm, reference in pairs if arm in arms and reference in arms]


def training_costs(events: pd.DataFrame | None, predictions: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Returns (optimizer steps, trained tokens) of a device by arm: summed over rounds, mean over answering devices.

    They are those that the engine counted. Arms that train nothing are not in the result; `rag_adapter` uses
    collaborative's adapter.
    """
    if events is None or events.empty:
        return {}
    done = events[(events["kind"] == "train") & events["steps"].notna()]
    totals = done.groupby("arm")[["steps", "tokens_in"]].sum()
    devices = predictions.groupby("arm")[["seed", "device_id"]].apply(lambda rows: len(rows.drop_duplicates()))
    owner = {arm: ARMS[arm].adapter if arm in ARMS else arm for arm in devices.index}
    return {
        arm: tuple(float(total) / int(devices[arm]) for total in totals.loc[own])
        for arm, own in owner.items()
        if own in totals.index
    }


@dataclass(frozen=True, slots=True)
class _Sums:
    """One metric of one arm: sums [clusters, columns] and the score of their total [..., columns] -> [...].

    `of_user` are the users' own scores, where a single user has one.
    """

    per_cluster: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    of_user: np.ndarray | None

    @property
    def value(self) -> float:
        return float(self.score(self.per_cluster.sum(0)))

    @property
    def without(self) -> np.ndarray:
        """The score without each cluster, [clusters]."""
        return without_each(self.per_cluster, self.score)


class _Comparison:
    """One task's answers, by arm, user and cluster."""

    def __init__(self, task: Task, frame: pd.DataFrame, seed: int, resamples: int) -> None:
        self.task, self.seed, self.resamples = task, seed, resamples
        order = ["seed", "user_id", "round", "query_id", "arm"]
        frame = frame.sort_values(order, kind="stable").reset_index(drop=True)
        self.arms = ordered(frame["arm"].unique())
        self._cluster = _numbered(frame, ["cluster"])
        self._user = _numbered(frame, ["seed", "user_id"])
        self._query = _numbered(frame, ["seed", "user_id", "query_id"])
        self._asked = _numbered(frame, order[:-1])
        self._scores = None if frame["gold"].notna().any() else frame["score"].to_numpy()
        self.metrics = task.metrics if self._scores is None else [m for m in task.metrics if m in _of_score(task)]
        self._pairs = list(zip(frame["prediction"].fillna("").tolist(), frame["gold"].tolist(), strict=True))
        self._rows = {arm: np.flatnonzero(frame["arm"] == arm) for arm in self.arms}
        came = frame["outcome"] == "ok" if "outcome" in frame else pd.Series(True, frame.index)
        self._silent = {arm for arm, rows in self._rows.items() if not came.iloc[rows].any()}

    def arm_rows(self, arm: str) -> list[TableRow]:
        """The arm's own rows, one a metric."""
        answers = self._rows[arm]
        return [self._row(arm, metric, None, answers, self._sums(metric, answers)) for metric in self.metrics]

    def contrast_rows(self, arm: str, reference: str, margin: float) -> list[TableRow]:
        """The comparison's rows, one a metric, over the queries that both arms answered."""
        answers, others = self._rows[arm], self._rows[reference]
        shared = np.intersect1d(self._asked[answers], self._asked[others])
        answers, others = (rows[np.isin(self._asked[rows], shared)] for rows in (answers, others))
        mine = [self._sums(metric, answers) for metric in self.metrics]
        theirs = [self._sums(metric, others) for metric in self.metrics]
        p_values = self._permute(mine, theirs)
        rows = []
        for metric, own, other, p in zip(self.metrics, mine, theirs, p_values, strict=True):
            row = self._row(arm, metric, reference, answers, own)
            if reference in self._silent and (arm, reference) in NON_INFERIORITY:
                rows.append(row)  # no verdict on answers that never came
                continue
            if len(shared):
                row["diff"], row["p"] = own.value - other.value, p
            if len(own.per_cluster) > 1:
                ends = jackknife_interval(own.value - other.value, own.without - other.without, ANY)
                row["diff_ci_low"], row["diff_ci_high"] = ends
            if own.of_user is not None:
                better = (own.of_user - other.of_user) * (1 if higher_is_better(metric) else -1)
                row["wins"] = int(np.count_nonzero(better > _TIE))
                row["losses"] = int(np.count_nonzero(better < -_TIE))
                row["ties"] = len(better) - row["wins"] - row["losses"]
            if (arm, reference) in NON_INFERIORITY and metric == self.task.primary:
                row["margin"], row["non_inferior"] = margin, _not_worse(row, margin)
            rows.append(row)
        return rows

    def _row(self, arm: str, metric: str, reference: str | None, answers: np.ndarray, own: _Sums) -> TableRow:
        low, high = None, None
        if len(own.per_cluster) > 1:
            low, high = jackknife_interval(own.value, own.without, SHARE if higher_is_better(metric) else AMOUNT)
        empty = (
            "diff",
            "diff_ci_low",
            "diff_ci_high",
            "wins",
            "ties",
            "losses",
            "p",
            "p_holm",
            "margin",
            "non_inferior",
        )
        return {
            "task": self.task.name,
            "arm": arm,
            "metric": metric,
            "reference": reference,
            "mean": own.value if len(answers) else None,
            "ci_low": low,
            "ci_high": high,
            **dict.fromkeys(empty),
            "n_users": len(np.unique(self._user[answers])),
            "n_clusters": len(own.per_cluster),
            "n_queries": len(np.unique(self._query[answers])),
        }

    def _permute(self, mine: list[_Sums], theirs: list[_Sums]) -> list[float | None]:
        """Two-sided p of each metric's difference, by swapping the two arms within clusters.

        The swaps depend on the seed and the number of clusters alone: all contrasts share them.
        """
        if not len(mine[0].per_cluster):
            return [None] * len(mine)
        apart = [own.per_cluster - other.per_cluster for own, other in zip(mine, theirs, strict=True)]
        rng = generator(self.seed, "statistics", self.task.name, "swap")
        moved, exact = swap_totals(np.hstack(apart), rng, self.resamples)
        p_values = []
        for own, other, part in zip(mine, theirs, _split(moved, mine), strict=True):
            one, two = own.per_cluster.sum(0), other.per_cluster.sum(0)
            permuted = own.score(one - part) - own.score(two + part)
            p_values.append(permutation_p(permuted, own.value - other.value, exact))
        return p_values

    def _sums(self, metric: str, answers: np.ndarray) -> _Sums:
        cluster = np.unique(self._cluster[answers], return_inverse=True)[1]
        clusters = int(cluster.max()) + 1 if len(cluster) else 0
        if metric == "macro_f1":
            labels = len(self.task.labels or ())
            counts = np.zeros((clusters, labels, 3))
            for kind, label in enumerate(self._f1_labels):
                known = label[answers] >= 0
                np.add.at(counts, (cluster[known], label[answers][known], kind), 1)
            return _Sums(
                counts.reshape(clusters, labels * 3),
                lambda total: macro_f1(total.reshape(*total.shape[:-1], labels, 3)),
                None,
            )
        if metric == "rmse":
            squares = np.bincount(cluster, self._values["mae"][answers] ** 2, clusters)
            count = np.bincount(cluster, minlength=clusters)
            return _Sums(np.stack([squares, count], 1), lambda total: np.sqrt(_ratio(total)), None)
        _, first, user = np.unique(self._user[answers], return_index=True, return_inverse=True)
        means = np.bincount(user, self._values[metric][answers]) / np.maximum(np.bincount(user), 1)
        count = np.bincount(cluster[first], minlength=clusters)
        return _Sums(np.stack([np.bincount(cluster[first], means, clusters), count], 1), _ratio, means)

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        """Query-level metrics of all answers, [answers]: each different (prediction, gold) scored once. Where the texts
        stayed on the devices, the scores that these sent.
        """
        if self._scores is not None:
            return {self.task.primary: self._scores}
        scored = {pair: score(self.task.name, *pair) for pair in dict.fromkeys(self._pairs)}
        metrics = next(iter(scored.values()))
        return {metric: np.array([scored[pair][metric] for pair in self._pairs]) for metric in metrics}

    @cached_property
    def _f1_labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The label that each answer is a true positive, false positive, false negative of, or -1: three [answers]."""
        place = {label: index for index, label in enumerate(self.task.labels or ())}
        predicted, true = (np.array([place.get(pair[side].strip(), -1) for pair in self._pairs]) for side in (0, 1))
        right = predicted == true
        return np.where(right, predicted, -1), np.where(right, -1, predicted), np.where(right, -1, true)


def _numbered(frame: pd.DataFrame, names: list[str]) -> np.ndarray:
    """A number for each different combination of values, [rows], in the order in which they appear."""
    numbers = np.zeros(len(frame), dtype=np.int64)
    for name in names:
        codes, values = pd.factorize(frame[name])
        numbers = pd.factorize(numbers * len(values) + codes)[0]
    return numbers


def _of_score(task: Task) -> set[str]:
    """The metrics that follow from each answer's score on the primary one; macro-F1 needs the answers themselves."""
    return {task.primary, *(["rmse"] if task.primary == "mae" else [])}


def _ratio(total: np.ndarray) -> np.ndarray:
    zero = np.zeros_like(total[..., 0])
    return np.divide(total[..., 0], total[..., 1], out=zero, where=total[..., 1] > 0)


def _split(totals: np.ndarray, sums: list[_Sums]) -> list[np.ndarray]:
    return np.split(totals, np.cumsum([one.per_cluster.shape[1] for one in sums])[:-1], axis=1)


def _is_primary(row: TableRow) -> bool:
    return (row["arm"], row["reference"]) in PRIMARY and row["metric"] == get_task(str(row["task"])).primary


def _not_worse(row: TableRow, margin: float) -> bool | None:
    if row["diff_ci_low"] is None:
        return None
    better = row["diff_ci_low"] if higher_is_better(str(row["metric"])) else -row["diff_ci_high"]
    return bool(better > -margin)
