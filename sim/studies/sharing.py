"""The analysis `sharing`: what training together is worth and costs, by strategy, link and evenness of data.

Three protocols, by EdgeFlowerTune's names: *quality under a budget* of bytes, *cost to a target* quality, and
*robustness*, quality with broken links against quality without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from untether.sim.core.errors import UserError
from untether.sim.experiment.arms import ALONE, FEDERATED, FLOOR
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.report.figures import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, style
from untether.sim.report.summary import metric_name
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.frames import USER, Runs, each_cell, labelled, paired_interval, user_scores
from untether.sim.studies.study import Study

STRATEGY, AVAILABILITY = "strategy.name", "network.availability"
_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MEGA = 1e6


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes `table.csv`, two figures and `findings.md`.

    Raises:
        UserError: The study has no axis `strategy.name`, or lacks an arm.
    """
    missing = [f"axis {STRATEGY}"] if STRATEGY not in study.axes else []
    missing += [f"arm {a}" for a in (FLOOR, ALONE, FEDERATED) if a not in study.cells[0].experiment.arms]
    if missing:
        raise UserError(f"{study.spec.name}: analysis sharing needs {', '.join(missing)}")
    courses = pd.concat(
        [labelled(cell, course(run.read("predictions"), run.read("events"))) for cell, run in each_cell(study, runs)],
        ignore_index=True,
    )
    budget = courses.groupby("cell")["bytes"].max().min()
    rows = pd.concat(
        [
            labelled(cell, outcome(run.read("predictions"), courses[courses["cell"] == cell.name], budget))
            for cell, run in each_cell(study, runs)
        ],
        ignore_index=True,
    )
    write_table(out, rows)
    save_figure(out, "1-course", draw_course(study, courses), "Quality after each round of training together, by cell.")
    save_figure(out, "2-cost", draw_cost(study, rows), "Gain over training alone against what a device moved.")
    write_findings(study, out, findings(study, rows, budget))


def course(predictions: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Returns a row a round and task: the arms' mean scores over users, and what a device has moved and spent so far.

    Columns: round, task, frozen, local, federated, bytes, energy_j, stragglers (share of those asked in the round).
    """
    devices = predictions[["seed", "device_id"]].drop_duplicates().shape[0]
    own = events[events["arm"] == FEDERATED]
    by_round = own.assign(bytes=own["bytes_up"].fillna(0) + own["bytes_down"].fillna(0)).groupby("round")
    rounds = sorted(predictions["round"].unique())
    spent = by_round[["bytes", "energy_j"]].sum().reindex(rounds).fillna(0.0).cumsum() / devices
    late = own[own["kind"] == "straggler"].groupby("round").size().reindex(rounds).fillna(0)
    sent = own[(own["kind"] == "upload") & (own["outcome"] == "ok")].groupby("round").size().reindex(rounds).fillna(0)
    scores = user_scores(predictions, by=("round", "arm", "task"))
    means = scores.pivot_table(index=["round", "task"], columns="arm", values="score")[[FLOOR, ALONE, FEDERATED]]
    found = means.reset_index().merge(spent.reset_index(), on="round")
    share = (late / (late + sent).where(late + sent > 0)).fillna(0.0)
    return found.merge(share.rename("stragglers").reset_index(), on="round")


def outcome(predictions: pd.DataFrame, of_rounds: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Returns a row a task: quality in the last round, and the three protocols.

    `gain` and `gain_over_frozen` are paired over users, more is better; the target is what `local` has in the last
    round; `rounds_to_target` is None where it is never reached. `score_at_budget` is the score after the last round
    that stays within `budget` bytes a device.
    """
    last = predictions[predictions["round"] == predictions["round"].max()]
    scores = user_scores(last).set_index([*USER, "task"])
    rows = []
    for task, rounds in of_rounds.groupby("task"):
        sign = 1.0 if higher_is_better(get_task(task).primary) else -1.0
        own = {arm: scores[scores["arm"] == arm]["score"].xs(task, level="task") for arm in (FLOOR, ALONE, FEDERATED)}
        row = {"task": task, "metric": get_task(task).primary, "score": own[FEDERATED].mean()}
        row["n_users"] = len(own[ALONE])
        for name, reference in (("gain", ALONE), ("gain_over_frozen", FLOOR)):
            mean, low, high, _ = paired_interval(sign * own[FEDERATED], sign * own[reference])
            row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        end = rounds.iloc[-1]
        row |= {"bytes": end["bytes"], "energy_j": end["energy_j"], "stragglers": rounds["stragglers"].mean()}
        there = rounds[sign * rounds[FEDERATED] >= sign * end[ALONE]]
        first = there.iloc[0] if len(there) else None
        row |= {
            "rounds_to_target": None if first is None else first["round"] + 1,
            "bytes_to_target": None if first is None else first["bytes"],
            "energy_to_target_j": None if first is None else first["energy_j"],
        }
        within = rounds[rounds["bytes"] <= budget]
        row["score_at_budget"] = within[FEDERATED].iloc[-1] if len(within) else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


# --- figures --------------------------------------------------------------------------------------------------


def _looks(study: Study) -> dict[str, tuple[str, str]]:
    names = [str(value) for value in study.values(STRATEGY)]
    return {name: (_COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)]) for n, name in enumerate(names)}


def _panels(study: Study, rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each place on the axes beside the strategy, and each task, with its title."""
    others = [axis for axis in study.axes if axis != STRATEGY]
    for place, own in rows.groupby([*others, "task"], sort=False):
        words = [f"{axis.rpartition('.')[2]} {value}" for axis, value in zip(others, place, strict=False)]
        yield ", ".join([place[-1].replace("_", "-"), *words]), own


def draw_course(study: Study, courses: pd.DataFrame) -> Figure:
    """Draws a panel a place, a line a strategy: quality after each round, with training alone and the frozen base."""
    looks = _looks(study)

    def draw(axis: Axes, own: pd.DataFrame) -> None:
        for arm, colour, dash in ((FLOOR, FAINT, ":"), (ALONE, INK, "--")):
            mean = own.groupby("round")[arm].mean()
            axis.plot(mean.index + 1, mean, color=colour, linestyle=dash, linewidth=1.0, label=arm)
        for name, line in own.groupby(STRATEGY, sort=False):
            colour, marker = looks[str(name)]
            axis.plot(
                line["round"] + 1, line[FEDERATED], color=colour, marker=marker, markersize=3, label=str(name)
            )  # fmt: skip

    metric = metric_name(get_task(courses["task"].iloc[0]).primary)
    return _multiples(list(_panels(study, courses)), draw, "rounds", metric)


def draw_cost(study: Study, rows: pd.DataFrame) -> Figure:
    """Draws a panel a place, a point a strategy: gain over training alone (95%) against megabytes a device."""
    looks = _looks(study)

    def draw(axis: Axes, own: pd.DataFrame) -> None:
        axis.axhline(0, color=FAINT, linewidth=0.7)
        for _, row in own.iterrows():
            colour, marker = looks[str(row[STRATEGY])]
            error = np.array([[row["gain"] - row["gain_low"]], [row["gain_high"] - row["gain"]]])
            axis.errorbar(
                row["bytes"] / _MEGA, row["gain"], yerr=error, color=colour, marker=marker, markersize=4, linestyle="",
                label=str(row[STRATEGY]),
            )  # fmt: skip

    return _multiples(list(_panels(study, rows)), draw, "MB a device, up and down", "gain over local (95% CI)")


def _multiples(
    panels: Sequence[tuple[str, pd.DataFrame]], draw: Callable[[Axes, pd.DataFrame], None], x: str, y: str
) -> Figure:
    """A figure of titled panels that share their axes' labels and one legend."""
    with style():
        wide = min(2, len(panels))
        tall = -(-len(panels) // wide)
        figure, axes = plt.subplots(tall, wide, figsize=(3.4 * wide, 2.1 * tall), sharex=True, squeeze=False)
        for axis, (title, own) in zip(axes.flat, panels, strict=False):
            draw(axis, own)
            axis.set_title(title, fontsize=8)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.supxlabel(x, fontsize=9)
        figure.supylabel(y, fontsize=9)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=min(6, len(labels)), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (2.1 * tall)))
    return figure


# --- in words -------------------------------------------------------------------------------------------------


def findings(study: Study, rows: pd.DataFrame, budget: float) -> list[str]:
    """Returns the sentences of the three protocols, from the table."""
    sentences = []
    for title, own in _panels(study, rows):
        sign = 1.0 if higher_is_better(own["metric"].iloc[0]) else -1.0
        best = own.loc[own["gain"].idxmax()]
        verdict = "gains most over training alone" if best["gain"] > 0 else "loses least against training alone"
        text = f"{title}: `{best[STRATEGY]}` {verdict}, {_signed(best)}; "
        better, worse = own[own["gain_low"] > 0], own[own["gain_high"] < 0]
        text += f"clearly better: {_names(better)}; clearly worse: {_names(worse)}."
        reached = own[own["rounds_to_target"].notna()]
        if len(reached):
            least = reached.loc[reached["bytes_to_target"].idxmin()]
            text += (
                f" Cheapest to what `local` has in the end: `{least[STRATEGY]}`, after "
                f"{least['rounds_to_target']:.0f} rounds and {least['bytes_to_target'] / _MEGA:.0f} MB a device."
            )
        else:
            text += " None reaches what `local` has in the end."
        under = own.loc[(sign * own["score_at_budget"]).idxmax()] if own["score_at_budget"].notna().any() else None
        if under is not None:
            text += f" Best within {budget / _MEGA:.0f} MB: `{under[STRATEGY]}` ({under['score_at_budget']:.3f})."
        sentences.append(text)
    if AVAILABILITY in study.axes:
        sentences += _robustness(study, rows)
    return sentences


def _robustness(study: Study, rows: pd.DataFrame) -> Iterator[str]:
    steps = sorted(study.values(AVAILABILITY), key=float)
    worst, full = (rows[rows[AVAILABILITY].astype(float) == float(step)] for step in (steps[0], steps[-1]))
    for task in dict.fromkeys(rows["task"]):
        sign = 1.0 if higher_is_better(get_task(task).primary) else -1.0
        lost = {
            str(name): sign * (
                worst[(worst[STRATEGY] == name) & (worst["task"] == task)]["score"].mean()
                - full[(full[STRATEGY] == name) & (full["task"] == task)]["score"].mean()
            )
            for name in study.values(STRATEGY)
        }  # fmt: skip
        told = ", ".join(f"`{name}` {change:+.3f}" for name, change in sorted(lost.items(), key=lambda pair: -pair[1]))
        late = worst[worst["task"] == task]["stragglers"].mean()
        yield (
            f"{task.replace('_', '-')}, robustness: from availability {float(steps[-1]):g} to {float(steps[0]):g}, "
            f"where {late:.0%} of those asked do not deliver, quality changes by {told}."
        )


def _names(rows: pd.DataFrame) -> str:
    return ", ".join(f"`{name}`" for name in rows[STRATEGY]) or "none"


def _signed(row: pd.Series) -> str:
    return f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
