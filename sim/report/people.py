"""Users one by one: how each fares under every arm, and how the gains are spread, not only their mean."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.experiment.arms import ALONE, CLOUD, FLOOR, METHOD, PRIMARY
from untether.sim.population.tasks import higher_is_better
from untether.sim.report.figures import BLUE, FAINT, INK, VERMILION, bare, style
from untether.sim.report.summary import Summary, metric_name, title

MOST_LINES = 80
"""Users drawn one by one in a panel; of more, so many spread evenly over those that there are."""

SHOWN = (FLOOR, ALONE, *(reference for _, reference in PRIMARY), METHOD, CLOUD)
"""The arms of the lines, in this order."""


def user_scores(metrics: pd.DataFrame, summary: Summary) -> dict[str, pd.DataFrame]:
    """Returns by task, a row a user (of a seed) and a column an arm: the mean of the primary metric over the user's
    answers. Tasks whose primary metric no single user has are left out.
    """
    found = {}
    for task in summary.tasks:
        own = metrics[(metrics["task"] == task) & (metrics["metric"] == summary.primary(task))]
        if not len(own):
            continue
        weighted = own.assign(total=own["value"] * own["n"]).groupby(["seed", "user_id", "arm"])[["total", "n"]].sum()
        table = (weighted["total"] / weighted["n"]).unstack("arm")
        found[task] = table[[arm for arm in summary.arms if arm in table]]
    return found


def lines(summary: Summary, scores: dict[str, pd.DataFrame]) -> Figure | None:
    """Returns every user a line over the arms, a panel a task; the mean in bold. None where fewer than two arms have
    scores.
    """
    tasks = [task for task, table in scores.items() if len(_arms(table)) > 1]
    if not tasks:
        return None
    with style():
        columns = min(3, len(tasks))
        rows = -(-len(tasks) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(0.5 + 2.1 * columns, 0.7 + 1.75 * rows), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for axis, task in zip(axes.flat, tasks, strict=False):
            table = scores[task][_arms(scores[task])]
            places = np.arange(len(table.columns))
            for _, row in _spread(table).iterrows():
                axis.plot(places, row, color=FAINT, linewidth=0.6, alpha=0.35, zorder=1)
            axis.plot(places, table.mean(), color=BLUE, linewidth=1.8, marker="o", markersize=3.5, zorder=3)
            names = [arm.replace("_", " ") for arm in table.columns]
            axis.set_xticks(places, names, fontsize=7, rotation=30, ha="right", rotation_mode="anchor")
            metric = summary.primary(task)
            better = "\N{UPWARDS ARROW}" if higher_is_better(metric) else "\N{DOWNWARDS ARROW}"
            axis.set_title(f"{title(task) or task}\n{metric_name(metric)} {better}", fontsize=8)
            axis.margins(x=0.04)
            bare(axis)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
    return figure


def gains(summary: Summary, scores: dict[str, pd.DataFrame]) -> Figure | None:
    """Returns the users' own gains of the method over each primary reference, a point a user, a row a task: right is
    better, whatever the metric. None where no pair has scores.
    """
    panels = [pair for pair in PRIMARY if any({*pair} <= set(table) for table in scores.values())]
    tasks = [task for task, table in scores.items() if any({*pair} <= set(table) for pair in panels)]
    if not panels or not tasks:
        return None
    with style():
        figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + 2.6 * len(panels), 0.8 + 0.5 * len(tasks)),
                                    sharey=True, squeeze=False, layout="constrained")  # fmt: skip
        for axis, (arm, reference) in zip(axes[0], panels, strict=True):
            axis.axvline(0, color=INK, linewidth=0.7, zorder=1)
            for place, task in enumerate(tasks):
                if {arm, reference} <= set(scores[task]):
                    _swarm(axis, place, gain_of(summary, task, scores[task], arm, reference))
            axis.set_title(f"against {reference.replace('_', ' ')}", fontsize=9)
            bare(axis, "x")
        axes[0][0].set_yticks(range(len(tasks)), [title(task) or task for task in tasks])
        axes[0][0].set_ylim(len(tasks) - 0.5, -0.5)
        figure.supxlabel("\N{LEFTWARDS ARROW} worse      a user's gain      better \N{RIGHTWARDS ARROW}", fontsize=9)
    return figure


def gain_of(summary: Summary, task: str, table: pd.DataFrame, arm: str, reference: str) -> np.ndarray:
    """Returns what each user gains by `arm` over `reference`, turned so that more is better."""
    sign = 1 if higher_is_better(summary.primary(task)) else -1
    return sign * (table[arm] - table[reference]).dropna().to_numpy()


def _swarm(axis: plt.Axes, place: int, values: np.ndarray) -> None:
    """Points that lie on each other are moved aside, by their rank among their like."""
    if not len(values):
        return
    values = np.sort(values)
    bins = np.round(values / max(1e-9, np.ptp(values) or 1.0) * 40).astype(int)
    ranks = np.concatenate([np.arange(n) - (n - 1) / 2 for n in np.unique(bins, return_counts=True)[1]])
    spread = min(0.06, 0.72 / max(1.0, float(np.ptp(ranks))))
    colours = [BLUE if value >= 0 else VERMILION for value in values]
    axis.scatter(values, place + ranks * spread, s=5, c=colours, alpha=0.55, linewidths=0, zorder=2)
    axis.plot([np.mean(values)] * 2, [place - 0.36, place + 0.36], color=INK, linewidth=1.4, zorder=3)


def _arms(table: pd.DataFrame) -> list[str]:
    return [arm for arm in SHOWN if arm in table]


def _spread(table: pd.DataFrame) -> pd.DataFrame:
    ordered: Sequence[int] = np.unique(np.linspace(0, len(table) - 1, min(MOST_LINES, len(table))).round().astype(int))
    return table.iloc[ordered]
