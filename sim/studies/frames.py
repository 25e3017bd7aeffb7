"""The finished cells as frames, and means over users with their intervals: what an analysis reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from sim.resampling import bootstrap_interval
from sim.results import RunDirectory
from sim.seeding import generator
from sim.studies.study import Cell, Study

Runs = Mapping[str, RunDirectory]
"""Finished runs by the name of their cell."""


def each_cell(study: Study, runs: Runs) -> Iterator[tuple[Cell, RunDirectory]]:
    """The cells with their runs, in the study's order. `cell.values` has the values by axis, `cell.words` as text."""
    for cell in study.cells:
        yield cell, runs[cell.name]


def labelled(cell: Cell, frame: pd.DataFrame) -> pd.DataFrame:
    """A frame with the cell's name and its values, as words, in front of its columns."""
    front = pd.DataFrame({"cell": cell.name, **cell.words}, index=frame.index)
    return pd.concat([front, frame], axis=1)


def summaries(study: Study, runs: Runs) -> pd.DataFrame:
    """The rows of every cell's `summary.json`, labelled."""
    return _stack(labelled(cell, pd.DataFrame(run.read_json("summary.json")["rows"]))
                  for cell, run in each_cell(study, runs))  # fmt: skip


def tables(study: Study, runs: Runs, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """One table of every cell, such as `predictions`, labelled; `columns` keeps what is needed of a large one."""
    return _stack(labelled(cell, run.read(name)[list(columns)] if columns else run.read(name))
                  for cell, run in each_cell(study, runs))  # fmt: skip


def user_scores(predictions: pd.DataFrame, by: Sequence[str] = ("arm", "task")) -> pd.DataFrame:
    """Answers averaged to users: the columns `by`, `seed`, `user_id` and `score` (the task's own, more may be worse).

    With `round` or a column of one's own in `by`, a row is a user's mean there.
    """
    return predictions.groupby([*by, "seed", "user_id"], sort=True, observed=True)["score"].mean().reset_index()


def mean_interval(values: Sequence[float] | pd.Series, resamples: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high) of one value a user: 95% bootstrap over users; no interval (nan) for fewer than two.

    The draw depends on the number of users alone, so the same call gives the same interval.
    """
    users = np.asarray(values, dtype=float)
    if len(users) < 2:
        return (float(users[0]) if len(users) else np.nan), np.nan, np.nan
    low, high = bootstrap_interval(users, generator(1, "study", "bootstrap"), resamples)
    return float(users.mean()), low, high


def paired_interval(
    scores: pd.Series, reference: pd.Series, resamples: int = 10_000
) -> tuple[float, float, float, int]:
    """(mean, low, high, users) of `scores - reference`, both one value a user with the user as index, on shared users.

    Set the index first, as in `frame.set_index(["seed", "user_id"])["score"]`.
    """
    apart = (scores - reference).dropna()
    return *mean_interval(apart, resamples), len(apart)


def _stack(frames: Iterator[pd.DataFrame]) -> pd.DataFrame:
    found = [frame for frame in frames if len(frame)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()
