"""The finished cells as frames, and means over users with their intervals: the input of every analysis."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from untether.sim.evaluation.resampling import ANY, cluster_interval
from untether.sim.evaluation.statistics import clustered, summarize
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.study import Cell, Study

Runs = Mapping[str, RunDirectory]
"""Finished runs by the name of their cell."""

USER = ["seed", "user_id", "cluster"]
"""Who a user is, and which users they are like: the index of a series that `mean_interval` reads."""


def each_cell(study: Study, runs: Runs) -> Iterator[tuple[Cell, RunDirectory]]:
    """Yields the cells with their runs, in the study's order. `cell.values` has the values by axis, `cell.words` texts.
    """
    for cell in study.cells:
        yield cell, runs[cell.name]


def labelled(cell: Cell, frame: pd.DataFrame) -> pd.DataFrame:
    """Returns a frame with the cell's name and its values, as words, in front of its columns."""
    front = pd.DataFrame({"cell": cell.name, **cell.words}, index=frame.index)
    return pd.concat([front, frame], axis=1)


def summaries(study: Study, runs: Runs, contrasts: Collection[tuple[str, str]] = ()) -> pd.DataFrame:
    """Returns the rows of every cell's `summary.json`, labelled, and of those `contrasts` that no summary has."""

    def rows(cell: Cell, run: RunDirectory) -> pd.DataFrame:
        found = pd.DataFrame(run.read_json("summary.json")["rows"])
        there = {pair for pair in contrasts if {*pair} <= {*cell.experiment.arms}}
        missing = sorted(there.difference(zip(found["arm"], found["reference"], strict=True)))
        if not missing:
            return found
        seeds, evaluation = cell.experiment.seeds, cell.experiment.evaluation
        more = summarize(
            run.read("predictions"), contrasts=missing, seed=seeds[0], resamples=evaluation.resamples,
            margin=evaluation.margin, margin_stars=evaluation.margin_stars,
        )  # fmt: skip
        return pd.DataFrame([*found.to_dict("records"), *(row for row in more if row["reference"] is not None)])

    return _stack(labelled(cell, rows(cell, run)) for cell, run in each_cell(study, runs))


def tables(study: Study, runs: Runs, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Returns one table of every cell, such as `predictions`, labelled; `columns` keeps only some of a large one."""
    return _stack(labelled(cell, run.read(name)[list(columns)] if columns else run.read(name))
                  for cell, run in each_cell(study, runs))  # fmt: skip


def user_scores(predictions: pd.DataFrame, by: Sequence[str] = ("arm", "task")) -> pd.DataFrame:
    """Returns answers averaged to users: the columns `by`, `USER` and `score` (the task's own, more may be worse).

    With `round` or a column of one's own in `by`, a row is a user's mean there.
    """
    frame = clustered(predictions)
    return frame.groupby([*by, *USER], sort=True, observed=True)["score"].mean().reset_index()


def mean_interval(
    values: Sequence[float] | pd.Series, bounds: tuple[float, float] = ANY
) -> tuple[float, float, float]:
    """Returns (mean, low, high) of one value a user: 95% over clusters of users; no interval (nan) for fewer than two.

    Args:
        values: A series whose index has the level `cluster`, as with `frame.set_index(USER)`, says which users are
            alike; otherwise each value is a cluster.
        bounds: `SHARE` and `AMOUNT` of `sim.evaluation.resampling` keep the interval within them.
    """
    users = np.asarray(values, dtype=float)
    named = isinstance(values, pd.Series) and "cluster" in values.index.names
    clusters = values.index.get_level_values("cluster") if named else np.arange(len(users))
    if len(set(clusters)) < 2:
        return (float(users.mean()) if len(users) else np.nan), np.nan, np.nan
    low, high = cluster_interval(users, clusters, bounds)
    return float(users.mean()), low, high


def paired_interval(scores: pd.Series, reference: pd.Series) -> tuple[float, float, float, int]:
    """Returns (mean, low, high, users) of `scores - reference` on shared users.

    Both have one value a user, with the user as index, as in `frame.set_index(USER)["score"]`.
    """
    apart = (scores - reference).dropna()
    return *mean_interval(apart), len(apart)


def _stack(frames: Iterator[pd.DataFrame]) -> pd.DataFrame:
    found = [frame for frame in frames if len(frame)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
