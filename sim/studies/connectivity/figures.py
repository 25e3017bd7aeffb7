"""The figures of the study `connectivity`, and the words that they share with its table: axes, kinds, durations.

Lengths of gaps have a colour and a marker each; availability runs from left to right, from always to never.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.clock import DAY_S, HOUR_S
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.report.figures import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, PURPLE, SKY, VERMILION, style
from untether.sim.report.summary import metric_name
from untether.sim.studies.study import Study

AVAILABILITY, GAP, FALLBACK = AXES = ("network.availability", "network.mean_down_s", "network.fallback")

KINDS = FRESH, OVERDUE, OWN, BASE = ("fresh", "stale", "own_data", "base")
"""Who answers: an adapter made with samples not longer ago than the policy asks for new ones; one made longer ago, or
with samples of an earlier time; one made on the device's own data alone; the frozen base."""

_COLOURS, _MARKERS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY), ("o", "s", "^", "D", "v", "P")
_KIND_LOOKS = {FRESH: (BLUE, ""), OVERDUE: (SKY, "////"), OWN: (ORANGE, "...."), BASE: ("#bdbdbd", "")}
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2)))
_X_LABEL = "availability of the link"


def span(seconds: float) -> str:
    """Returns a duration in its natural unit: `10 min`, `6 h`, `3 d`."""
    for unit, size in (("d", DAY_S), ("h", HOUR_S), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def draw_gain(study: Study, points: pd.DataFrame) -> Figure:
    """Draws a row a task, a panel a fallback, a line a length of the gaps: gain of `collaborative` over `local`."""
    tasks, fallbacks = sorted(points["task"].unique()), study.values(FALLBACK)
    with style():
        figure, axes = _panels(len(tasks), len(fallbacks), width=2.2, height=1.95)
        for panels, task in zip(axes, tasks, strict=True):
            metric = get_task(task).primary
            for axis, fallback in zip(panels, fallbacks, strict=True):
                own = points[(points["task"] == task) & (points[FALLBACK] == fallback)]
                axis.axhline(0, color=INK, linewidth=0.7)
                axis.axhline(own["gain_of_base"].mean(), color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
                _lines(study, axis, own, "gain")
                axis.set_title(f"fallback: {fallback.replace('_', ' ')}")
            turned = "" if higher_is_better(metric) else ", turned"
            panels[0].set_ylabel(f"{task.replace('_', '-')}: gain over local\n({metric_name(metric)}{turned}, 95% CI)")
        last = axes[0][-1]
        last.annotate("frozen base", (1, points["gain_of_base"].mean()), xycoords=("axes fraction", "data"),
                      xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=7, color=FAINT)  # fmt: skip
        return _finish(figure, axes, "gaps of ")


def draw_survival(study: Study, curves: pd.DataFrame) -> Figure:
    """Draws a panel an availability between always and never, a line a length of the gaps, for the first fallback."""
    steps = [step for step in study.values(AVAILABILITY) if 0 < step < 1] or study.values(AVAILABILITY)
    curves = curves[curves[FALLBACK] == study.values(FALLBACK)[0]]
    end_d = study.cells[0].experiment.rounds
    with style():
        figure, axes = _panels(1, len(steps), width=2.6, height=2.0)
        for axis, step in zip(axes[0], steps, strict=True):
            for number, gap in enumerate(study.values(GAP)):
                own = curves[(curves[AVAILABILITY] == step) & (curves[GAP] == gap)]
                days = [*own["time_s"] / DAY_S, end_d]
                levels = {name: [*own[name], own[name].iloc[-1]] for name in ("share", "low", "high")}
                colour = _COLOURS[number % len(_COLOURS)]
                dashes = _DASHES[number % len(_DASHES)]
                axis.step(
                    days, levels["share"], where="post", color=colour, linewidth=1.3, linestyle=dashes, label=span(gap)
                )
                axis.fill_between(
                    days, levels["low"], levels["high"], step="post", color=colour, alpha=0.12, linewidth=0
                )
            axis.set_title(f"availability {step:g}")
            axis.set_xlim(0, end_d)
            axis.set_ylim(-0.02, 1.02)
            axis.set_xlabel("days")
        axes[0][0].set_ylabel("share of devices without\nan adapter from samples")
        return _finish(figure, axes, "gaps of ")


def draw_answerers(study: Study, points: pd.DataFrame) -> Figure:
    """Draws a row a fallback, a panel a length of the gaps: the share of questions answered by each kind, stacked."""
    gaps, fallbacks, steps = (study.values(axis) for axis in (GAP, FALLBACK, AVAILABILITY))
    shares = points.groupby([FALLBACK, GAP, AVAILABILITY])[list(KINDS)].mean()
    with style():
        figure, axes = _panels(len(fallbacks), len(gaps), width=1.65, height=1.3)
        for row, fallback in enumerate(fallbacks):
            for axis, gap in zip(axes[row], gaps, strict=True):
                left = np.zeros(len(steps))
                own = shares.loc[[(fallback, gap, step) for step in steps]]
                for kind in KINDS:
                    colour, hatch = _KIND_LOOKS[kind]
                    axis.bar(range(len(steps)), own[kind], 0.78, bottom=left, color=colour, hatch=hatch,
                             edgecolor=PAPER, linewidth=0.5, label=kind.replace("_", " "))  # fmt: skip
                    left += own[kind].to_numpy()
                axis.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
                axis.set_ylim(0, 1)
                if row == 0:
                    axis.set_title(f"gaps of {span(gap)}")
            axes[row][0].set_ylabel(fallback.replace("_", " "))
        for axis in axes[-1]:
            axis.set_xlabel("availability")
        return _finish(figure, axes)


def draw_costs(study: Study, points: pd.DataFrame) -> Figure:
    """Draws the age of the adapters that answered, a panel a fallback, and below it the costs of the first fallback.

    The costs are bytes wasted, energy spent, and waits in the cloud's queue.
    """
    fallbacks = study.values(FALLBACK)
    places = points.groupby([FALLBACK, AVAILABILITY, GAP]).first().reset_index()  # whatever the task
    first = places[places[FALLBACK] == fallbacks[0]].copy()
    for suffix in ("", "_low", "_high"):
        first[f"wasted_kb{suffix}"] = first[f"bytes_wasted{suffix}"] / 1000
        first[f"energy_kj{suffix}"] = first[f"energy_j{suffix}"] / 1000
    below = (
        ("wasted_kb", "bytes wasted\n(kB a device)"), ("energy_kj", "training and radio\n(kJ a device)"),
        ("queued_p95_s", "wait in the queue\n(s, 95th percentile)"),
    )  # fmt: skip
    with style():
        figure, axes = _panels(2, max(len(below), len(fallbacks)), width=2.3, height=1.7, sharey=False)
        for axis in (*axes[0][len(fallbacks) :], *axes[1][len(below) :]):
            axis.set_visible(False)
        top = 1.05 * places["age_d_high"].fillna(places["age_d"]).max()
        for axis, fallback in zip(axes[0], fallbacks, strict=False):
            _lines(study, axis, places[places[FALLBACK] == fallback], "age_d")
            axis.set_title(f"fallback: {fallback.replace('_', ' ')}")
            axis.set_ylim(0, top)
        axes[0][0].set_ylabel("age of the adapter\nthat answered (days)")
        for axis, (name, label) in zip(axes[1], below, strict=False):
            _lines(study, axis, first, name)
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
        return _finish(figure, axes, "gaps of ")


def _panels(
    rows: int, columns: int, width: float, height: float, sharey: bool | str = "row"
) -> tuple[Figure, np.ndarray]:
    size = (0.5 + width * columns, 0.45 + height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=sharey, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(study: Study, axis: plt.Axes, points: pd.DataFrame, name: str) -> None:
    """`name` against availability with its interval (where the frame has one), a line a length of the gaps."""
    steps, gaps = study.values(AVAILABILITY), study.values(GAP)
    for number, gap in enumerate(gaps):
        line = points[points[GAP] == gap].set_index(AVAILABILITY).reindex(steps)
        x = np.arange(len(steps)) + 0.09 * (number - (len(gaps) - 1) / 2)
        spread = None
        if f"{name}_low" in line:
            spread = np.stack([line[name] - line[f"{name}_low"], line[f"{name}_high"] - line[name]]).clip(min=0)
        axis.errorbar(
            x, line[name], yerr=spread, color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.4, linewidth=1.1, elinewidth=0.8, label=span(gap),
        )  # fmt: skip
    axis.set_xticks(range(len(steps)), [f"{step:g}" for step in steps])
    if axis.get_subplotspec().is_last_row():
        axis.set_xlabel(_X_LABEL)


def _finish(figure: Figure, axes: np.ndarray, before: str = "") -> Figure:
    """One legend above all panels."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, [before + label for label in labels], loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
        ncols=len(labels), handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip
    figure.tight_layout(pad=0.5)
    return figure
