"""Runs beside each other: what differs in their experiments, and in their results where users agree."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import UserError
from untether.sim.core.seeding import generator
from untether.sim.evaluation.resampling import cluster_interval, sign_flip_p
from untether.sim.experiment.arms import METHOD, ordered
from untether.sim.population.tasks import higher_is_better
from untether.sim.report import figures
from untether.sim.report.html import inline, template
from untether.sim.report.people import user_scores
from untether.sim.report.summary import Summary, interval, metric_name, number, p_value
from untether.sim.run.directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Difference:
    """One arm of one task in two runs, over the users that both have: the mean paired difference, second minus first,
    with its 95% interval and the sign-flip p over clusters of users.
    """

    task: str
    metric: str
    arm: str
    first: str
    second: str
    n_users: int
    first_mean: float
    second_mean: float
    diff: float
    low: float | None
    high: float | None
    p: float

    def verdict(self) -> str:
        """Returns the outcome in a word, by the interval; nothing is corrected for the number of comparisons."""
        if self.low is None or self.high is None:
            return "too few users"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.diff > 0) == higher_is_better(self.metric) else "worse"


class Comparison:
    """Finished runs by name, the first one being what the others are compared with. Raises UserError for fewer than two
    and for one that is not finished.
    """

    def __init__(self, runs: Sequence[RunDirectory]):
        if len(runs) < 2:
            raise UserError("compare: give two runs or more")
        for run in runs:
            if run.read_json("summary.json") is None:
                raise UserError(f"{run.path}: the run is not finished. Go on with it: untether run --resume {run.path}")
        self.runs = dict(zip(_names([run.path for run in runs]), runs, strict=True))
        self.summaries = {name: Summary(run.read_json("summary.json")) for name, run in self.runs.items()}
        self.tasks = [
            task for task in next(iter(self.summaries.values())).tasks
            if sum(task in summary.tasks for summary in self.summaries.values()) > 1
        ]  # fmt: skip

    def fields(self) -> list[tuple[str, list[str]]]:
        """Returns the fields of the experiments in which the runs differ, with each one's value."""
        flat = [_flat(run.experiment.model_dump(mode="json")) for run in self.runs.values()]
        names = dict.fromkeys(name for values in flat for name in values)
        rows = [(name, [_word(values.get(name)) for values in flat]) for name in names if name != "name"]
        return [(name, words) for name, words in rows if len(set(words)) > 1]

    def facts(self) -> list[tuple[str, list[str]]]:
        """Returns what else there is to tell the runs apart: commit, end, machine time."""
        rows: dict[str, list[str]] = {"commit": [], "ended": [], "wall": []}
        for run in self.runs.values():
            environment = run.read_json("environment.json") or {}
            rows["commit"].append(str(environment.get("commit") or "\N{EN DASH}")[:12])
            rows["ended"].append(str(environment.get("ended") or "\N{EN DASH}"))
            rows["wall"].append(f"{(environment.get('usage') or {}).get('wall_s', 0):.0f} s")
        return list(rows.items())

    def differences(self) -> list[Difference]:
        """Returns every later run against the first, every task and arm that both have, over the users that both have.
        """
        base, *others = self.runs
        tables = {name: self._scores(name) for name in self.runs}
        clusters = {name: _clusters(run) for name, run in self.runs.items()}
        found = []
        for other in others:
            for task in self.tasks:
                mine, theirs = tables[base].get(task), tables[other].get(task)
                if mine is None or theirs is None:
                    continue
                for arm in [arm for arm in ordered(mine) if arm in theirs]:
                    pairs = pd.concat([mine[arm], theirs[arm]], axis=1, keys=["first", "second"], join="inner").dropna()
                    if len(pairs):
                        found.append(self._difference(task, arm, base, other, pairs, clusters[base]))
        return found

    def _difference(
        self, task: str, arm: str, first: str, second: str, pairs: pd.DataFrame, clusters: dict[tuple[int, str], str]
    ) -> Difference:
        diff = (pairs["second"] - pairs["first"]).to_numpy()
        own = [clusters.get(user, f"{user[0]} {user[1]}") for user in pairs.index]
        low, high = cluster_interval(diff, own) if len(set(own)) > 1 else (None, None)
        p = sign_flip_p(diff, generator(0, "compare", task, arm), clusters=own)
        metric = self.summaries[first].primary(task)
        return Difference(
            task, metric, arm, first, second, len(pairs), float(pairs["first"].mean()), float(pairs["second"].mean()),
            float(diff.mean()), low, high, p,
        )  # fmt: skip

    def _scores(self, name: str) -> dict[str, pd.DataFrame]:
        return user_scores(self.runs[name].read("metrics"), self.summaries[name])

    def figure(self) -> Figure | None:
        """Returns every run's means and intervals overlaid, a panel a task, a row an arm; None without a common task.
        """
        if not self.tasks:
            return None
        arms = [arm for arm in ordered({arm for s in self.summaries.values() for arm in s.arms})]
        colours = (figures.BLUE, figures.VERMILION, figures.GREEN, figures.PURPLE, figures.ORANGE, figures.SKY)
        columns = min(3, len(self.tasks))
        rows = -(-len(self.tasks) // columns)
        with figures.style():
            size = (1.4 + 1.9 * columns, 0.6 + (0.6 + 0.24 * len(arms)) * rows)
            figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
            for axis, task in zip(axes.flat, self.tasks, strict=False):
                for place, (name, summary) in enumerate(self.summaries.items()):
                    means = [(row, summary.mean(task, arm)) for row, arm in enumerate(arms)]
                    known = [(row, found) for row, found in means if found and found.get("mean") is not None]
                    y = np.array([row for row, _ in known]) + (place - (len(self.runs) - 1) / 2) * 0.7 / len(self.runs)
                    x = np.array([found["mean"] for _, found in known])
                    low, high = (
                        np.array([found["mean"] if found[end] is None else found[end] for _, found in known])
                        for end in ("ci_low", "ci_high")
                    )
                    colour, marker = colours[place % len(colours)], "osD^vP"[place % 6]
                    axis.hlines(y, low, high, color=colour, linewidth=1.1)
                    axis.plot(x, y, marker, color=colour, markersize=3.6, linestyle="none", label=name)
                metric = next(summary.primary(task) for summary in self.summaries.values() if task in summary.tasks)
                axis.set_title(f"{task.replace('_', '-')}, {metric_name(metric)}")
                axis.set_yticks(range(len(arms)), [arm.replace("_", " ") for arm in arms], fontsize=7.5)
                figures.bare(axis, "x")
            axes.flat[0].invert_yaxis()
            for axis in axes.flat[len(self.tasks) :]:
                axis.set_visible(False)
            handles, labels = axes.flat[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
        return figure

    def lead(self, found: Sequence[Difference]) -> str:
        """Returns the comparison in one sentence: the method's arm, where it differs."""
        own = [one for one in found if one.arm == METHOD]
        if not own:
            return "These runs have no task, arm and users in common that could be compared."
        told = [f"{one.second} is {one.verdict()} on {one.task.replace('_', '-')}" for one in own
                if one.verdict() in ("better", "worse")]  # fmt: skip
        users = min(one.n_users for one in own)
        start = f"Over {users} common users, collaborative: "
        return start + ("; ".join(told) if told else "no difference shown on any task") + "."


def write_comparison(runs: Sequence[RunDirectory], out: Path) -> Path:
    """Writes `compare.html`, `differences.csv` and `figures/` to a folder; returns the page's path."""
    comparison = Comparison(runs)
    found = comparison.differences()
    figure = comparison.figure()
    out.mkdir(parents=True, exist_ok=True)
    drawn = None
    if figure is not None:
        drawn = inline(figures.save(figure, out / "figures", "runs"), "runs", "Every arm's mean and interval, by run")
    text = io.StringIO()
    pd.DataFrame([{**_row(one), "verdict": one.verdict()} for one in found]).to_csv(text, index=False)
    write_atomically(out / "differences.csv", text.getvalue())
    page = template("sim/report/compare.html.jinja").render(
        names=list(comparison.runs), fields=comparison.fields(), facts=comparison.facts(), differences=found,
        figure=drawn, lead=comparison.lead(found), paths=[str(run.path) for run in comparison.runs.values()],
    )  # fmt: skip
    write_atomically(out / "compare.html", page)
    return out / "compare.html"


def _row(one: Difference) -> dict[str, object]:
    return {name: getattr(one, name) for name in Difference.__dataclass_fields__}


def words(one: Difference) -> tuple[str, ...]:
    """Returns a difference as a terminal's table shows it."""
    around = interval(one.low, one.high, signed=True)
    return (
        one.task, one.arm, str(one.n_users), number(one.first_mean), number(one.second_mean),
        f"{number(one.diff, signed=True)} {around}", p_value(one.p), one.verdict(),
    )  # fmt: skip


def _clusters(run: RunDirectory) -> dict[tuple[int, str], str]:
    frame = run.read("predictions", ["seed", "user_id", "cluster"]).dropna().drop_duplicates(["seed", "user_id"])
    return {(int(seed), str(user)): str(cluster) for seed, user, cluster in frame.itertuples(index=False)}


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    for depth in range(1, 1 + max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if all(a != b for a, b in combinations(names, 2)):
            return names
    raise UserError("compare: the same run is given twice")


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _word(value: object) -> str:
    if value is None:
        return "\N{EN DASH}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


__all__ = ["Comparison", "Difference", "words", "write_comparison"]
