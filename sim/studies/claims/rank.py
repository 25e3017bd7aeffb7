"""The analysis `rank`: quality, adapter bytes, training memory and time by LoRA rank, and where more stops paying."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import FLOOR, METHOD
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.report.figures import BLUE, FAINT, GREEN, ORANGE, VERMILION, style
from untether.sim.report.summary import metric_name
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.claims.hardware import cost_of
from untether.sim.studies.frames import USER, Runs, each_cell, mean_interval, paired_interval, tables, user_scores
from untether.sim.studies.study import Study

ROW = 256
"""Tokens of the row whose training memory is told."""


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes the table (a row a rank and task), the figure and the findings."""
    points = measure(study, runs)
    if points.empty:
        raise UserError(f"{study.spec.name}: no cell answers with {METHOD} and {FLOOR}. Name both in base.arms")
    write_table(out, points)
    save_figure(out, "rank", draw(points), "Gain over the frozen base, and what it costs, by LoRA rank")
    write_findings(study, out, findings(points))


def measure(study: Study, runs: Runs) -> pd.DataFrame:
    """Returns a row a rank and task: `gain` over the frozen base with its interval (turned so that more is better), the
    paired difference to the best rank (`behind`, with its upper end), and what the nominal model's adapter costs.
    """
    scores = user_scores(tables(study, runs, "predictions"), ["cell", "arm", "task"])
    rows = []
    for task, own in scores.groupby("task"):
        sign = 1.0 if higher_is_better(get_task(str(task)).primary) else -1.0
        wide = own.set_index(["cell", "arm", *USER])["score"].sort_index() * sign
        by_cell = {}
        for cell, run in each_cell(study, runs):
            arms = {arm: wide.loc[cell.name, arm] for arm in (METHOD, FLOOR) if (cell.name, arm) in wide.index}
            if len(arms) == 2:
                by_cell[cell.name] = cell, run, arms[METHOD], arms[METHOD] - arms[FLOOR]
        if not by_cell:
            continue
        best = max(by_cell, key=lambda name: by_cell[name][2].mean())
        for cell, run, score, gain in by_cell.values():
            mean, low, high = mean_interval(gain.dropna())
            behind, least, most, users = paired_interval(score, by_cell[best][2])
            rows.append({
                "rank": cell.experiment.lora.rank, "task": task, "metric": get_task(str(task)).primary, "gain": mean,
                "low": low, "high": high, "to_best": behind, "to_best_low": least, "to_best_high": most,
                "best": cell.name == best, "users": users, **costs(cell.experiment, run),
            })  # fmt: skip
    return pd.DataFrame(rows).sort_values(["task", "rank"], ignore_index=True) if rows else pd.DataFrame()


def costs(experiment: Experiment, run: RunDirectory) -> dict[str, float]:
    """Returns what this rank costs the nominal model on the experiment's device; time and energy are those of the run.
    """
    cost, events = cost_of(experiment), run.read("events")
    done = events[(events["kind"] == "train") & (events["arm"] == METHOD) & (events["outcome"] == "ok")]
    return {
        "adapter_mb": cost.adapter_bytes() / 1e6, "memory_gb": cost.training_bytes(ROW) / 1e9,
        "train_s": float(done["duration_s"].median()), "train_kj": float(done["energy_j"].median()) / 1000,
    }  # fmt: skip


def enough(points: pd.DataFrame) -> pd.Series:
    """Returns the smallest rank of a task that is not shown to be worse than its best: the difference's interval holds
    0.
    """
    fit = points[(points["to_best_high"] >= 0) | points["best"]]
    return fit.loc[fit["rank"].idxmin()]


def findings(points: pd.DataFrame) -> Iterator[str]:
    """Yields a sentence a task: the best rank, the smallest that is not shown to be worse, and what the others cost."""
    for task, own in points.groupby("task", sort=False):
        best, least, last = own[own["best"]].iloc[0], enough(own), own.iloc[-1]
        name = metric_name(best["metric"])
        most = "" if last["best"] else f" Rank {int(last['rank'])}: {_gain(last)}."
        yield (
            f"{task} ({name}, {int(best['users'])} users): best at rank {int(best['rank'])}, {_gain(best)} over the "
            f"frozen base; rank {int(least['rank'])} has {_gain(least)}, and is the smallest that is not shown to be "
            f"worse ({least['to_best']:+.3f} [{least['to_best_low']:+.3f}, {least['to_best_high']:+.3f}] to the best): "
            f"from there on more is not shown to pay.{most}"
        )
    first, last = points.iloc[0], points.sort_values("rank").iloc[-1]
    yield (
        f"An adapter of the nominal model takes {first['adapter_mb']:.1f} MB at rank {int(first['rank'])} and "
        f"{last['adapter_mb']:.0f} MB at {int(last['rank'])}; training memory goes from {first['memory_gb']:.2f} to "
        f"{last['memory_gb']:.2f} GB, a training from {first['train_s']:.0f} to {last['train_s']:.0f} s."
    )


def draw(points: pd.DataFrame) -> Figure:
    """Draws gain by rank with its 95% interval, a panel a task, and a panel of the costs, as multiples of the
    smallest's.
    """
    tasks = list(dict.fromkeys(points["task"]))
    with style():
        figure, axes = plt.subplots(1, len(tasks) + 1, figsize=(2.4 * (len(tasks) + 1), 2.3), squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            own = points[points["task"] == task]
            spread = [own["gain"] - own["low"], own["high"] - own["gain"]]
            axis.errorbar(own["rank"], own["gain"], yerr=spread, marker="o", color=BLUE, markersize=3.5, linewidth=1.1)
            axis.axvline(enough(own)["rank"], color=FAINT, linestyle="--", linewidth=0.8)
            axis.set_title(f"{task.replace('_', '-')}  ({metric_name(own['metric'].iloc[0])})")
            axis.set_ylabel("gain over frozen (95% CI)")
        dear, own = axes.flat[len(tasks)], points[points["task"] == tasks[0]]
        for column, label, colour, mark in (
            ("adapter_mb", "adapter bytes", ORANGE, "s"), ("memory_gb", "training memory", GREEN, "^"),
            ("train_s", "training time", VERMILION, "D"),
        ):  # fmt: skip
            ratio = own[column] / own[column].iloc[0]
            dear.plot(own["rank"], ratio, mark + "-", color=colour, markersize=3.5, linewidth=1.0, label=label)
        dear.set_yscale("log", base=2)
        dear.set_ylabel(f"times that of rank {int(own['rank'].iloc[0])}")
        dear.legend(frameon=False)
        for axis in axes.flat:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(points["rank"].unique()), [str(rank) for rank in sorted(points["rank"].unique())])
            axis.set_xlabel("LoRA rank")
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
    return figure


def _gain(row: pd.Series) -> str:
    return f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
