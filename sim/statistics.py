"""From answers to the rows of `summary.json`: every arm's score, and every comparison between two arms, over users.

Answers are averaged to a user, then users are compared in pairs. A query counts in a comparison only where both arms
answered it (an outcome other than `ok` is an answer: an empty one, scored as such). Several seeds are pooled: a user is
(seed, user_id), and seeds draw disjoint users.

`diff` is always arm minus reference, in the metric's own direction; `wins` are users with the better score, so for MAE
a negative `diff` goes with wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from sim.metrics import macro_f1, score
from sim.population.tasks import Task, get_task, higher_is_better
from sim.resampling import bootstrap_totals, holm, interval, permutation_p, swap_totals
from sim.sections import ARMS
from sim.seeding import generator

PRIMARY = (("collaborative", "local_matched"), ("collaborative", "placebo"))
"""The contrasts that are tested: Holm's correction is over tasks times these, on each task's primary metric."""
NON_INFERIORITY = ("collaborative", "cloud")
"""The contrast that is judged against a margin: not worse if its interval lies above -margin."""
CONTRASTS = (*PRIMARY, NON_INFERIORITY, ("collaborative", "frozen"), ("collaborative", "unfiltered_matched"))
FLOOR = "frozen"

_TIE = 1e-12
_ADAPTER_OF = {"rag_adapter": "collaborative"}

Row = dict[str, object]
Contrast = tuple[str, str]


def summarize(
    predictions: pd.DataFrame,
    events: pd.DataFrame | None = None,
    contrasts: Sequence[Contrast] | None = None,
    margin: float = 0.02,
    seed: int = 0,
    resamples: int = 10_000,
) -> list[Row]:
    """The rows of `summary.json`, from the tables `predictions` and `events` of a run directory.

    For each task, arm and metric a row with `reference` None: `mean` over users (macro-F1 and RMSE: over all answers)
    with its interval. For each task, contrast and metric a row with the reference: `mean` is the arm's on the shared
    queries, `diff` the paired difference with its interval, and a two-sided p by swapping the arms within users
    (for a mean that is the sign-flip test; exact for few users). Intervals are 95% percentile bootstraps over users,
    None for fewer than two users. `p_holm` only for `PRIMARY` on the primary metric; `margin` and `non_inferior` only
    for `NON_INFERIORITY` on it; wins, ties and losses only where a single user has a score. `steps` and `tokens` are
    what a device trained on average over all rounds.

    `contrasts` defaults to `CONTRASTS` and every other arm against `frozen`; those with an absent arm are left out.
    The same tables, seed and resamples give the same rows, in whatever order the tables are.
    """
    rows: list[Row] = []
    costs = training_costs(events, predictions)
    for name in sorted(predictions["task"].unique()):
        comparison = _Comparison(get_task(name), predictions[predictions["task"] == name], seed, resamples)
        chosen = default_contrasts(comparison.arms) if contrasts is None else contrasts
        for arm in comparison.arms:
            rows += comparison.arm_rows(arm)
        for arm, reference in chosen:
            if arm in comparison.arms and reference in comparison.arms:
                rows += comparison.contrast_rows(arm, reference, margin)
    family = [row for row in rows if _is_primary(row) and row["p"] is not None]
    for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = adjusted
    for row in rows:
        row["steps"], row["tokens"] = costs.get(row["arm"], (0.0, 0.0))
    return rows


def default_contrasts(arms: Sequence[str]) -> list[Contrast]:
    """The design's contrasts and every other arm against `frozen`, as far as the arms are there."""
    pairs = dict.fromkeys([*CONTRASTS, *((arm, FLOOR) for arm in arms if arm != FLOOR)])
    return [(arm, reference) for arm, reference in pairs if arm in arms and reference in arms]


def training_costs(events: pd.DataFrame | None, predictions: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Arm -> (optimizer steps, trained tokens) of a device, summed over rounds, mean over the devices that answered.

    From the events, which have what the engine counted. Arms that train nothing are not in the result; `rag_adapter`
    uses collaborative's adapter.
    """
    if events is None or events.empty:
        return {}
    done = events[(events["kind"] == "train") & events["steps"].notna()]
    totals = done.groupby("arm")[["steps", "tokens_in"]].sum()
    devices = predictions.groupby("arm")[["seed", "device_id"]].apply(lambda rows: len(rows.drop_duplicates()))
    owner = {arm: _ADAPTER_OF.get(arm, arm) for arm in devices.index}
    return {
        arm: tuple(float(total) / int(devices[arm]) for total in totals.loc[own])
        for arm, own in owner.items()
        if own in totals.index
    }


@dataclass(frozen=True, slots=True)
class _Sums:
    """One metric of one arm: per-user sums [users, columns] and the score of their total [..., columns] -> [...]."""

    per_user: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    of_user: np.ndarray | None


class _Comparison:
    """One task's answers, by arm and user."""

    def __init__(self, task: Task, frame: pd.DataFrame, seed: int, resamples: int) -> None:
        self.task, self.seed, self.resamples = task, seed, resamples
        order = ["seed", "user_id", "round", "query_id", "arm"]
        frame = frame.sort_values(order, kind="stable").reset_index(drop=True)
        self.arms = sorted(
            frame["arm"].unique(), key=lambda arm: (list(ARMS).index(arm) if arm in ARMS else len(ARMS), arm)
        )
        self._user = frame.groupby(["seed", "user_id"]).ngroup().to_numpy()
        self._query = frame.groupby(["seed", "user_id", "query_id"]).ngroup().to_numpy()
        self._asked = frame.groupby(order[:-1]).ngroup().to_numpy()
        self._pairs = list(zip(frame["prediction"].fillna(""), frame["gold"], strict=True))
        self._known: dict[tuple[str, bytes], tuple[list[_Sums], list[np.ndarray | None]]] = {}
        self._rows = {arm: np.flatnonzero(frame["arm"] == arm) for arm in self.arms}
        self._score([(arm, self._rows[arm]) for arm in self.arms])

    def arm_rows(self, arm: str) -> list[Row]:
        """The arm's own rows, one a metric."""
        answers = self._rows[arm]
        every = zip(self.task.metrics, *self._scored(arm, answers), strict=True)
        return [self._row(arm, metric, None, answers, sums, boot) for metric, sums, boot in every]

    def contrast_rows(self, arm: str, reference: str, margin: float) -> list[Row]:
        """The comparison's rows, one a metric, over the queries that both arms answered."""
        answers, others = self._rows[arm], self._rows[reference]
        shared = np.intersect1d(self._asked[answers], self._asked[others])
        answers, others = (rows[np.isin(self._asked[rows], shared)] for rows in (answers, others))
        mine, boots = self._scored(arm, answers)
        theirs, other_boots = self._scored(reference, others)
        p_values = self._permute(mine, theirs)
        rows = []
        for place, metric in enumerate(self.task.metrics):
            own, other, boot = mine[place], theirs[place], boots[place]
            row = self._row(arm, metric, reference, answers, own, boot)
            if len(shared):
                row["diff"] = float(own.score(own.per_user.sum(0)) - other.score(other.per_user.sum(0)))
                row["p"] = p_values[place]
            if boot is not None:
                row["diff_ci_low"], row["diff_ci_high"] = interval(boot - other_boots[place])
            if own.of_user is not None:
                better = (own.of_user - other.of_user) * (1 if higher_is_better(metric) else -1)
                row["wins"] = int(np.count_nonzero(better > _TIE))
                row["losses"] = int(np.count_nonzero(better < -_TIE))
                row["ties"] = len(better) - row["wins"] - row["losses"]
            if (arm, reference) == NON_INFERIORITY and metric == self.task.primary:
                row["margin"], row["non_inferior"] = margin, _not_worse(row, margin)
            rows.append(row)
        return rows

    def _scored(self, arm: str, answers: np.ndarray) -> tuple[list[_Sums], list[np.ndarray | None]]:
        """Each metric of some of an arm's answers, with its bootstrap; most contrasts ask for all of them again."""
        if (arm, answers.tobytes()) not in self._known:
            self._score([(arm, answers)])
        return self._known[arm, answers.tobytes()]

    def _score(self, several: Sequence[tuple[str, np.ndarray]]) -> None:
        """Scores several arms' answers; those of equally many users are resampled together: drawing is what costs."""
        sums = [[self._sums(metric, answers) for metric in self.task.metrics] for _, answers in several]
        alike: dict[int, list[int]] = {}
        for place, own in enumerate(sums):
            alike.setdefault(len(own[0].per_user), []).append(place)
        for places in alike.values():
            boots = iter(self._bootstrap([one for place in places for one in sums[place]]))
            for place in places:
                arm, answers = several[place]
                self._known[arm, answers.tobytes()] = sums[place], [next(boots) for _ in sums[place]]

    def _row(
        self, arm: str, metric: str, reference: str | None, answers: np.ndarray, own: _Sums, boot: np.ndarray | None
    ) -> Row:
        low, high = (None, None) if boot is None else interval(boot)
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
            "mean": float(own.score(own.per_user.sum(0))) if len(answers) else None,
            "ci_low": low,
            "ci_high": high,
            **dict.fromkeys(empty),
            "n_users": len(own.per_user),
            "n_queries": len(np.unique(self._query[answers])),
        }

    def _bootstrap(self, sums: list[_Sums]) -> list[np.ndarray | None]:
        """Each score on the same resampled users, [resamples]; None for fewer than two users.

        The draw depends on the seed and the number of users alone: arms and metrics share it (common random numbers).
        """
        if len(sums[0].per_user) < 2:
            return [None] * len(sums)
        totals = bootstrap_totals(np.hstack([one.per_user for one in sums]), self._rng("bootstrap"), self.resamples)
        return [one.score(part) for one, part in zip(sums, _split(totals, sums), strict=True)]

    def _permute(self, mine: list[_Sums], theirs: list[_Sums]) -> list[float | None]:
        """Two-sided p of each metric's difference, by swapping the two arms within users."""
        if not len(mine[0].per_user):
            return [None] * len(mine)
        apart = [own.per_user - other.per_user for own, other in zip(mine, theirs, strict=True)]
        moved, exact = swap_totals(np.hstack(apart), self._rng("swap"), self.resamples)
        p_values = []
        for own, other, part in zip(mine, theirs, _split(moved, mine), strict=True):
            one, two = own.per_user.sum(0), other.per_user.sum(0)
            observed = float(own.score(one) - own.score(two))
            p_values.append(permutation_p(own.score(one - part) - own.score(two + part), observed, exact))
        return p_values

    def _rng(self, purpose: str) -> np.random.Generator:
        return generator(self.seed, "statistics", self.task.name, purpose)

    def _sums(self, metric: str, answers: np.ndarray) -> _Sums:
        user = np.unique(self._user[answers], return_inverse=True)[1]
        users = int(user.max()) + 1 if len(user) else 0
        count = np.bincount(user, minlength=users).astype(float)
        if metric == "macro_f1":
            labels = len(self.task.labels or ())
            shape = (users, labels, 3)
            counts = np.zeros(shape)
            for kind, label in enumerate(self._f1_labels):
                known = label[answers] >= 0
                np.add.at(counts, (user[known], label[answers][known], kind), 1)
            return _Sums(
                counts.reshape(users, labels * 3),
                lambda total: macro_f1(total.reshape(*total.shape[:-1], labels, 3)),
                None,
            )
        if metric == "rmse":
            squares = np.bincount(user, self._values["mae"][answers] ** 2, users)
            return _Sums(np.stack([squares, count], 1), lambda total: np.sqrt(_ratio(total)), None)
        means = np.bincount(user, self._values[metric][answers], users) / count
        return _Sums(np.stack([means, np.ones(users)], 1), _ratio, means)

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        """Query-level metrics of all answers, [answers]: each different (prediction, gold) scored once."""
        scored = {pair: score(self.task.name, *pair) for pair in dict.fromkeys(self._pairs)}
        metrics = next(iter(scored.values()))
        return {metric: np.array([scored[pair][metric] for pair in self._pairs]) for metric in metrics}

    @cached_property
    def _f1_labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The label that each answer is a true positive, false positive, false negative of, or -1: three [answers]."""
        place = {label: index for index, label in enumerate(self.task.labels or ())}
        said, true = (np.array([place.get(pair[side].strip(), -1) for pair in self._pairs]) for side in (0, 1))
        right = said == true
        return np.where(right, said, -1), np.where(right, -1, said), np.where(right, -1, true)


def _ratio(total: np.ndarray) -> np.ndarray:
    return np.divide(total[..., 0], total[..., 1])


def _split(totals: np.ndarray, sums: list[_Sums]) -> list[np.ndarray]:
    return np.split(totals, np.cumsum([one.per_user.shape[1] for one in sums])[:-1], axis=1)


def _is_primary(row: Row) -> bool:
    return (row["arm"], row["reference"]) in PRIMARY and row["metric"] == get_task(str(row["task"])).primary


def _not_worse(row: Row, margin: float) -> bool | None:
    if row["diff_ci_low"] is None:
        return None
    better = row["diff_ci_low"] if higher_is_better(str(row["metric"])) else -row["diff_ci_high"]
    return bool(better > -margin)
