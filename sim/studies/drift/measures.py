"""The measures of the study `drift`, on frames: the loss of quality with an adapter's age, and the costs of a policy.

A frame of answers has a row an answer: `KEYS`, `arm`, `good` (the task's score, turned so that more is better), `age`
(days since the answering adapter was trained; NaN: no adapter), `since` (days since the user changed; NaN: never does)
and `users` (`changed`, `unchanged`, or `real` where it is unknown). A column or level `cluster` says which users are
alike; without one each user is a cluster. A user who changes stays in the cluster of the archetype they start from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from untether.sim.core.seeding import generator
from untether.sim.evaluation.metrics import score
from untether.sim.evaluation.resampling import ANY, drawn_clusters, widened_tails
from untether.sim.evaluation.statistics import clustered
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import FLOOR, METHOD, trained
from untether.sim.population.source import FromWorld
from untether.sim.population.tasks import get_task
from untether.sim.population.world.truth import answers as both_answers
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.frames import mean_interval

REAL = "real"
"""Users of files, as `users` calls them: whether they change, nobody knows."""

USER = ["seed", "device_id"]
KEYS = ["seed", "round", "device_id", "task", "query_id"]

COSTS = ("refreshes", "bytes", "tokens", "energy_j", "minutes")
"""Of one user: times trained, bytes up and down, cloud tokens, joules of radio and training, minutes of training."""


def studied(experiment: Experiment) -> str | None:
    """Returns the arm that the study is about: `collaborative`, else the first that is trained."""
    arms = trained(experiment.arms)
    return METHOD if METHOD in arms else next(iter(arms), None)


# --- reading a run -------------------------------------------------------------------------------------------------


def read_answers(run: RunDirectory) -> pd.DataFrame:
    """Returns the answers of a run, by the base model and by the watched arm, with columns `input` and `prediction`."""
    experiment = run.experiment
    answers = clustered(run.read("predictions"))
    answers = answers[answers["arm"].isin([FLOOR, studied(experiment)])]
    answers = answers[[*KEYS, "cluster", "arm", "input", "prediction", "score", "answered_by"]]
    sign = answers["task"].map(lambda task: 1.0 if get_task(task).higher_is_better else -1.0)
    answers["good"] = answers["score"] * sign
    answers = with_age(answers, read_trained(run))
    known = read_changes(run)
    if known.empty:
        return answers.assign(since=np.nan, users=REAL if experiment.population.source == "lamp" else "unchanged")
    answers = answers.merge(known, on=[*USER, "task"], how="left")
    answers["since"] = answers["round"] - answers["changed_on"]
    return answers.assign(users=np.where(answers["changed_on"].isna(), "unchanged", "changed"))


def read_trained(run: RunDirectory) -> pd.DataFrame:
    """Returns when the watched arm's adapters were trained: `USER` and `round`, once a round."""
    events = run.read("events")
    done = (events["kind"] == "train") & (events["outcome"] == "ok") & (events["arm"] == studied(run.experiment))
    return events.loc[done, [*USER, "round"]].drop_duplicates().sort_values("round", ignore_index=True)


def read_changes(run: RunDirectory) -> pd.DataFrame:
    """Returns when users changed, from the world's truth; empty without one.

    Columns: `USER`, `task`, `changed_on` (round; NaN: never).
    """
    if not (run.path / "truth.parquet").exists():
        return pd.DataFrame(columns=[*USER, "task", "changed_on"])
    truth = run.read("truth").rename(columns={"changed_on_round": "changed_on"})
    return truth[[*USER, "task", "changed_on"]].drop_duplicates(ignore_index=True)


def read_costs(run: RunDirectory) -> pd.DataFrame:
    """Returns the costs of the whole run by device: `COSTS`, by `USER`. Only those of the watched arm."""
    events, arm = run.read("events"), studied(run.experiment)
    of = clusters(run.read("predictions"))
    found = costs(events[(events["kind"] == "augment") | (events["arm"] == arm)], of.index)
    return found.join(of).set_index("cluster", append=True)


def clusters(predictions: pd.DataFrame) -> pd.Series:
    """Returns the cluster of each user, by `USER`."""
    return clustered(predictions).groupby(USER)["cluster"].first()


def costs(events: pd.DataFrame, users: pd.MultiIndex) -> pd.DataFrame:
    """Returns `COSTS` by user, from rows of `events`; users without a row cost nothing."""
    asked, trained = events["kind"] == "augment", events["kind"] == "train"
    rows = events[USER].assign(
        refreshes=(trained & (events["outcome"] == "ok")).astype(float),
        bytes=events["bytes_up"].fillna(0) + events["bytes_down"].fillna(0),
        tokens=np.where(asked, events["tokens_in"].fillna(0) + events["tokens_out"].fillna(0), 0.0),
        energy_j=events["energy_j"].fillna(0),
        minutes=np.where(trained, events["duration_s"].fillna(0) / 60, 0.0),
    )
    return rows.groupby(USER)[list(COSTS)].sum().reindex(users.sort_values(), fill_value=0.0)


def read_two_golds(run: RunDirectory, answers: pd.DataFrame) -> pd.DataFrame:
    """Returns the answers by adapters of users who change, scored on their old and their new preferences. World only.

    `before` is the score on what the user of before would have answered, `now` on what they answer now, both turned so
    that more is better.
    """
    answers = answers[(answers["users"] == "changed") & answers["age"].notna()]
    worlds = {seed: FromWorld(run.experiment, seed).world for seed in run.experiment.seeds}
    dated = run.read("predictions")[[*KEYS, "user_id", "query_time_s"]].drop_duplicates(KEYS)
    answers = answers.merge(dated, on=KEYS)
    both = [
        both_answers(worlds[row.seed], row.user_id, row.task, row.input, row.query_time_s)
        for row in answers.itertuples()
    ]
    for name in ("before", "now"):
        answers[name] = [
            np.nan if texts is None else _good(row.task, row.prediction, getattr(texts, name))
            for row, texts in zip(answers.itertuples(), both, strict=True)
        ]
    return answers.dropna(subset=["before", "now"])


def _good(task: str, prediction: str, gold: str) -> float:
    value = score(task, prediction, gold)[get_task(task).primary]
    return value if get_task(task).higher_is_better else -value


# --- measures ------------------------------------------------------------------------------------------------------


def with_age(answers: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """Returns answers with `age`: days from the last round in which their device trained; NaN without an adapter."""
    born = trained.assign(born=trained["round"].astype(float)).sort_values("round")
    joined = pd.merge_asof(answers.sort_values("round", kind="stable"), born, on="round", by=USER)
    joined["age"] = (joined["round"] - joined["born"]).where(joined["answered_by"] == "adapter")
    return joined.drop(columns="born")


def paired(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Returns the adapters' answers to the same queries in two cells.

    `apart` is `one`'s good minus `other`'s; the rest of the columns are `other`'s.
    """
    one = one.loc[one["age"].notna(), [*KEYS, "good"]].rename(columns={"good": "reference"})
    both = other[other["age"].notna()].merge(one, on=KEYS)
    return both.assign(apart=both["reference"] - both["good"])


def gain_over_frozen(answers: pd.DataFrame) -> pd.DataFrame:
    """Returns the adapters' answers with `gain`: how much better they are than the base model's to the same query."""
    base = answers.loc[answers["arm"] == FLOOR, [*KEYS, "good"]].rename(columns={"good": "base"})
    mine = answers[answers["age"].notna()].merge(base, on=KEYS)
    return mine.assign(gain=mine["good"] - mine["base"])


def reach(answers: pd.DataFrame) -> int:
    """Returns the greatest age that the adapters of all users reach: beyond it, a mean would be of other users.

    Real users ask when they did, some on one day only: half of them are enough.
    """
    oldest = answers.groupby(USER)["age"].max().dropna()
    share = 0.5 if (answers["users"] == REAL).any() else 0.0
    return int(oldest.quantile(share, interpolation="higher")) if len(oldest) else 0


def along(frame: pd.DataFrame, at: str, value: str, width: int = 1) -> pd.DataFrame:
    """Returns `value` along `at`: columns `from`, `to` (whole days), `value, low, high, n_users`.

    It is the mean over users' own means, with its 95% interval over users.

    Args:
        frame: Rows with `at` and `value`.
        at: The column of days.
        value: The column to average.
        width: Days that are taken together (the last ones may be fewer).
    """
    start = (frame[at] // width * width).astype(int)
    own = frame.assign(start=start).groupby(["start", *_who(frame)])[value].mean()
    rows, last = [], frame[at].max()
    for place, of_users in own.groupby(level="start"):
        mean, low, high = mean_interval(of_users)
        rows.append((place, min(place + width - 1, last), mean, low, high, len(of_users)))
    return pd.DataFrame(rows, columns=["from", "to", "value", "low", "high", "n_users"])


def overall(
    frame: pd.DataFrame, value: str, bounds: tuple[float, float] = ANY
) -> tuple[float, float, float, int]:
    """Returns (mean, low, high, users) of `value`: over users' own means, with its 95% interval over users.

    `bounds` as in `sim.studies.frames.mean_interval`.
    """
    own = frame.groupby(_who(frame))[value].mean().dropna()
    return *mean_interval(own, bounds), len(own)


def _who(frame: pd.DataFrame) -> list[str]:
    return [*USER, "cluster"] if "cluster" in [*frame.columns, *frame.index.names] else USER


def half_life(
    gains: pd.DataFrame, upto: int, resamples: int = 2000, value: str = "gain"
) -> tuple[float, float, float]:
    """Returns (days, low, high) until `value` has fallen to half of its value at age 0; infinite: not by `upto`.

    The curve by age is the mean over users, made non-increasing by least squares (pool adjacent violators), with
    straight lines between days. The 95% interval is of clusters drawn with replacement, its tails widened for their
    number. NaN where there is no gain to halve.
    """
    some = gains[gains["age"] <= upto]
    table = some.groupby([*_who(some), "age"])[value].mean().unstack("age").reindex(columns=range(upto + 1))
    values = table.to_numpy(float)
    if not len(values):
        return np.nan, np.nan, np.nan
    there = ~np.isnan(values)
    named = "cluster" in table.index.names
    of = pd.factorize(table.index.get_level_values("cluster"))[0] if named else np.arange(len(values))
    count = int(of.max()) + 1
    draw = drawn_clusters(count, generator(1, "study", "half-life"), resamples)[:, of]
    times = np.vstack([np.ones(len(values)), draw])
    counts = times @ there
    means = np.divide(times @ np.where(there, values, 0.0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    found = np.array([_halved(curve, weight) for curve, weight in zip(means, counts, strict=True)])
    if np.isnan(found[0]):
        return np.nan, np.nan, np.nan
    if count < 2:
        return float(found[0]), np.nan, np.nan
    low, high = np.quantile(np.where(np.isnan(found[1:]), 0.0, found[1:]), widened_tails(count), method="nearest")
    return float(found[0]), float(low), float(high)


def _halved(curve: np.ndarray, weights: np.ndarray) -> float:
    known = ~np.isnan(curve)
    days, fitted = np.flatnonzero(known), falling(curve[known], weights[known])
    if not len(fitted) or fitted[0] <= 0:
        return np.nan
    half = fitted[0] / 2
    below = np.flatnonzero(fitted <= half)
    if not len(below):
        return np.inf
    place = below[0]  # never 0: half is below the start
    share = (fitted[place - 1] - half) / (fitted[place - 1] - fitted[place])
    return days[place - 1] + share * (days[place] - days[place - 1])


def falling(values: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """Returns the non-increasing sequence nearest to `values` by weighted least squares."""
    blocks: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            value, weight, size = blocks.pop()
            before = blocks[-1]
            total = before[1] + weight
            blocks[-1] = [(before[0] * before[1] + value * weight) / total, total, before[2] + size]
    return np.repeat([value for value, _, _ in blocks], [int(size) for _, _, size in blocks])


def detections(trained: pd.DataFrame, changed_on: pd.Series, rounds: int) -> pd.DataFrame:
    """Returns the performance of a detector, a row a user of `changed_on` (by `USER`, NaN: never changes).

    `false`: refreshes after the first time and before the change. `quiet`: days on which it could have raised them.
    `delay`: days from the change, or from the first time if that is later, to the first refresh (NaN: none).
    """
    rows = []
    times = trained.groupby(USER)["round"].apply(sorted).to_dict()
    for user, change in changed_on.items():
        first, *later = times.get(user, [rounds])
        end = rounds if np.isnan(change) else change
        found = [round for round in later if round >= end]
        rows.append({
            "false": sum(round < end for round in later), "quiet": max(0, end - first - 1),
            "delay": found[0] - max(change, first) if found else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows, index=changed_on.index, columns=["false", "quiet", "delay"])


def front(cost: Sequence[float], good: Sequence[float]) -> list[bool]:
    """Returns which points are on the Pareto front: no other one costs no more, is no worse, and differs."""
    pairs = list(zip(cost, good, strict=True))
    return [not any(c <= own and g >= mine and (c, g) != (own, mine) for c, g in pairs) for own, mine in pairs]


def fresh_for(stale: Experiment, candidate: Experiment) -> bool:
    """Returns whether a cell refreshes what another one keeps: as long a history, no samples of earlier times."""
    drift = candidate.drift
    same = candidate.population == stale.population and candidate.training == stale.training
    return same and drift.policy == "every" and drift.samples == "refresh" and stale.drift.policy == "never"
