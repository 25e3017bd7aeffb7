"""What a study says: its table, its figure, and sentences made from the numbers."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sim.population.tasks import get_task, higher_is_better
from sim.report.figures import BLUE, FAINT, ORANGE, SKY, save, style
from sim.report.summary import metric_name
from sim.results import write_atomically
from sim.studies.study import Study

_COLOURS = (BLUE, ORANGE, SKY)
_MARKERS = ("o", "s", "^")


def write_answer(study: Study, out: Path, rows: pd.DataFrame) -> None:
    """Writes `table.csv`, `figures/<name>.svg` and `.pdf`, and `findings.md` into the study's folder."""
    points = gains(study, rows)
    write_atomically(out / "table.csv", points.to_csv(index=False, float_format="%.4f"))
    save(draw(study, points), out / "figures", study.spec.name)
    write_atomically(out / "findings.md", f"# {study.spec.question}\n\n" + "\n".join(findings(study, points)) + "\n")


def gains(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """The contrasts of the figure on each task's primary metric, a row a cell: `gain` is turned so that more is better.

    Columns: cell, the fields of the grid, task, metric, arm, reference, gain, low, high, n_users.
    """
    found = rows[rows["reference"].notna()].copy()
    pairs = set(study.spec.figure.contrasts)
    keep = [
        (row.arm, row.reference) in pairs and get_task(row.task).primary == row.metric for row in found.itertuples()
    ]
    found = found[np.array(keep, dtype=bool)]
    sign = np.where([higher_is_better(metric) for metric in found["metric"]], 1.0, -1.0)
    found["gain"] = sign * found["diff"].astype(float)
    ends = np.sort(np.stack([sign * found["diff_ci_low"], sign * found["diff_ci_high"]]).astype(float), axis=0)
    found["low"], found["high"] = ends
    columns = ["cell", *study.spec.grid, "task", "metric", "arm", "reference", "gain", "low", "high", "n_users"]
    return found[columns].reset_index(drop=True)


def draw(study: Study, points: pd.DataFrame) -> Figure:
    """Small multiples: a panel a task, gain with its 95% interval against the figure's field, a line a contrast."""
    spec, tasks = study.spec.figure, sorted(points["task"].unique())
    order = list(dict.fromkeys(points[spec.x]))
    with style():
        wide = min(3, len(tasks))
        tall = -(-len(tasks) // wide)
        figure, axes = plt.subplots(tall, wide, figsize=(2.35 * wide, 1.9 * tall), sharex=True, squeeze=False)
        for panel, axis in enumerate(axes.flat):
            if panel >= len(tasks):
                axis.set_visible(False)
                continue
            own = points[points["task"] == tasks[panel]]
            axis.axhline(0, color=FAINT, linewidth=0.7)
            for number, (arm, reference) in enumerate(spec.contrasts):
                line = own[(own["arm"] == arm) & (own["reference"] == reference)]
                if line.empty:
                    continue
                x = np.array([order.index(value) for value in line[spec.x]]) + 0.08 * (number - 0.5)
                spread = np.stack([line["gain"] - line["low"], line["high"] - line["gain"]])
                axis.errorbar(
                    x, line["gain"], yerr=spread, color=_COLOURS[number], marker=_MARKERS[number], markersize=3.2,
                    linewidth=1.1, elinewidth=0.8, label=f"over {reference.replace('_', ' ')}",
                )  # fmt: skip
            metric = own["metric"].iloc[0]
            turned = "" if higher_is_better(metric) else ", turned"
            axis.set_title(f"{tasks[panel].replace('_', '-')}  ({metric_name(metric)}{turned})")
            axis.set_xticks(range(len(order)), order)
            axis.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(spec.label or spec.x, fontsize=9)
        figure.supylabel("gain (95% CI)", fontsize=9)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def findings(study: Study, points: pd.DataFrame) -> list[str]:
    """One sentence a contrast and task: the gain at both ends of the figure's field, and where it is clear of zero."""
    spec, sentences = study.spec.figure, []
    for arm, reference in spec.contrasts:
        for task in sorted(points["task"].unique()):
            own = points[(points["arm"] == arm) & (points["reference"] == reference) & (points["task"] == task)]
            if own.empty:
                continue
            first, last = own.iloc[0], own.iloc[-1]
            clear = own[(own["low"] > 0)][spec.x].tolist()
            worse = own[(own["high"] < 0)][spec.x].tolist()
            where = f"better at {', '.join(clear)}" if clear else "nowhere shown to be better"
            where += f", worse at {', '.join(worse)}" if worse else ""
            sentences.append(
                f"- {task}, {arm} over {reference} ({metric_name(first.metric)}, {int(first.n_users)} users): "
                f"{_value(first)} at {spec.label or spec.x} = {first[spec.x]}, "
                f"{_value(last)} at {last[spec.x]}; {where}."
            )
    return sentences


def _value(row: pd.Series) -> str:
    return f"{row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
