"""The analysis `gain`: the gains of contrasts of arms along one axis, as a table, a figure and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.errors import UserError
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.report.figures import BLUE, FAINT, GREEN, ORANGE, PURPLE, SKY, VERMILION, style
from untether.sim.report.summary import metric_name
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.frames import Runs, summaries
from untether.sim.studies.study import Study

_COLOURS = (BLUE, ORANGE, SKY, GREEN, PURPLE, VERMILION)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes `table.csv`, `figures/<name>.svg` and `.pdf`, and `findings.md`."""
    points = gains(study, summaries(study, runs, study.spec.figure.contrasts))
    if points.empty:
        pairs = ", ".join(f"{arm} - {reference}" for arm, reference in study.spec.figure.contrasts)
        raise UserError(f"{study.spec.name}: no cell compares {pairs}. Name arms that run, in figure.contrasts or arms")
    write_table(out, points)
    caption = f"Gain along {_label(study)}: mean over users with its 95% interval; above zero is better."
    save_figure(out, study.spec.name, draw(study, points), caption)
    write_findings(study, out, findings(study, points))


def gains(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the contrasts of the figure on each task's primary metric, a row a cell; in `gain`, more is better.

    Columns: cell, the axes, task, metric, arm, reference, gain, low, high, n_users.
    """
    found = rows[rows["reference"].notna()].copy()
    pairs = set(study.spec.figure.contrasts)
    keep = [
        (row.arm, row.reference) in pairs and get_task(row.task).primary == row.metric for row in found.itertuples()
    ]
    found = found[np.array(keep, dtype=bool)]
    sign = np.where([higher_is_better(metric) for metric in found["metric"]], 1.0, -1.0)
    found["gain"] = sign * found["diff"].astype(float) + 0.0  # no -0
    ends = np.sort(np.stack([sign * found["diff_ci_low"], sign * found["diff_ci_high"]]).astype(float), axis=0) + 0.0
    found["low"], found["high"] = ends
    columns = ["cell", *study.axes, "task", "metric", "arm", "reference", "gain", "low", "high", "n_users"]
    return found[columns].reset_index(drop=True)


def lines(study: Study, points: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Yields the lines of the figure: (arm, reference, place on the other axes, points along the figure's axis)."""
    others = [axis for axis in study.axes if axis != _x(study)]
    for arm, reference in study.spec.figure.contrasts:
        own = points[(points["arm"] == arm) & (points["reference"] == reference)]
        for place, line in own.groupby(others, sort=False) if others else [((), own)]:
            if len(line):
                where = ", ".join(f"{axis.split('.')[-1]} {value}" for axis, value in zip(others, place, strict=True))
                yield arm, reference, where, line


def draw(study: Study, points: pd.DataFrame) -> Figure:
    """Draws small multiples: a panel a task, gain with its 95% interval against the figure's axis.

    There is a line a contrast (and place on the other axes).
    """
    x_axis, tasks = _x(study), sorted(points["task"].unique())
    order = list(dict.fromkeys(points[x_axis]))
    alike = all(set(own[x_axis]) == set(order) for _, own in points.groupby("task"))  # else each panel has its own axis
    with style():
        wide = min(3, len(tasks))
        tall = -(-len(tasks) // wide)
        figure, axes = plt.subplots(tall, wide, figsize=(2.35 * wide, 1.9 * tall), sharex=alike, squeeze=False)
        for panel, axis in enumerate(axes.flat):
            if panel >= len(tasks):
                axis.set_visible(False)
                continue
            own = points[points["task"] == tasks[panel]]
            order = order if alike else list(dict.fromkeys(own[x_axis]))
            axis.axhline(0, color=FAINT, linewidth=0.7)
            drawn = list(lines(study, own))
            for number, (_, reference, where, line) in enumerate(drawn):
                aside = 0.08 * (number - (len(drawn) - 1) / 2)
                x = np.array([order.index(value) for value in line[x_axis]]) + aside
                spread = np.stack([line["gain"] - line["low"], line["high"] - line["gain"]])
                axis.errorbar(
                    x, line["gain"], yerr=spread, color=_COLOURS[number % len(_COLOURS)],
                    marker=_MARKERS[number % len(_MARKERS)], markersize=3.2, linewidth=1.1, elinewidth=0.8,
                    label=", ".join(filter(None, [f"over {reference.replace('_', ' ')}", where])),
                )  # fmt: skip
            metric = own["metric"].iloc[0]
            turned = "" if higher_is_better(metric) else ", turned"
            axis.set_title(f"{tasks[panel].replace('_', '-')}  ({metric_name(metric)}{turned})")
            axis.set_xticks(range(len(order)), order)
            axis.margins(x=0.05 if len(order) > 1 else 1.0)
            axis.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(_label(study), fontsize=9)
        figure.supylabel("gain (95% CI)", fontsize=9)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        across = min(len(labels), max(2, wide))
        figure.legend(handles, labels, loc="upper center", ncols=across, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - (0.05 + 0.18 * -(-len(labels) // across)) / (1.9 * tall)))
    return figure


def findings(study: Study, points: pd.DataFrame) -> list[str]:
    """Returns a sentence a contrast and task (and place on the other axes): the gain at both ends, with its interval.
    """
    sentences, x, label = [], _x(study), _label(study)
    for task in sorted(points["task"].unique()):
        for arm, reference, place, own in lines(study, points[points["task"] == task]):
            first, last = own.iloc[0], own.iloc[-1]
            clear = own[(own["low"] > 0)][x].tolist()
            worse = own[(own["high"] < 0)][x].tolist()
            where = f"better at {', '.join(clear)}" if clear else "nowhere shown to be better"
            where += f", worse at {', '.join(worse)}" if worse else ""
            ends = f"{_value(first)} at {label} = {first[x]}"
            if len(own) > 1:
                ends += f", {_value(last)} at {last[x]}"
            else:
                where = "better" if clear else "worse" if worse else "not shown to be better"
            sentences.append(
                f"{task}, {arm} over {reference}{f', {place}' if place else ''} "
                f"({metric_name(first.metric)}, {int(first.n_users)} users): {ends}; {where}."
            )
    return sentences


def _x(study: Study) -> str:
    return study.spec.figure.x or study.axes[0]


def _label(study: Study) -> str:
    return study.spec.figure.label or _x(study)


def _value(row: pd.Series) -> str:
    return f"{row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
