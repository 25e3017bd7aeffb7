"""From committed rounds to what people read: the tables, the statistics, the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from untether.sim.core.clock import WallClock
from untether.sim.core.records import CUT
from untether.sim.evaluation.metrics import mostly_unseen, unicode_rouge
from untether.sim.evaluation.statistics import summarize
from untether.sim.population.source import FromWorld, open_population
from untether.sim.population.tasks import get_task
from untether.sim.report import write_report
from untether.sim.run.directory import RunDirectory
from untether.sim.run.shared import SharedAdapters
from untether.sim.run.usage import Usage

COMPARED = (
    "seed", "round", "device_id", "user_id", "arm", "task", "query_id", "prediction", "gold",
    "score", "cluster", "outcome",
)  # fmt: skip
"""Columns of `predictions` that the statistics need."""
ASKED = ("kind", "attempt", "outcome", "detail")
"""Columns of `events` that tell what the cloud's answers were worth."""
TRAINED = ("kind", "arm", "steps", "tokens_in")
"""Columns of `events` that they need."""
PLACEBOS = ("placebos", "placebos_of_two", "placebos_short", "placebo_samples", "placebo_samples_of_second")
"""Counts of the learn passes that say how far a placebo is one other user's."""
CONTEXT = ("examples_cut", "prompts_cut")
"""Counts of the learn passes that say what did not fit into the base model's context."""


def finish(
    run: RunDirectory, truth: Mapping[tuple[str, str, str], str], cloud: Mapping[str, Any], usage: Usage
) -> None:
    """Merges the parts, computes `summary.json`, writes tables, figures and `report.html`. Safe to run again."""
    experiment = run.experiment
    run.merge(experiment, truth)
    rows = summarize(
        run.read("predictions", COMPARED), run.read("events", TRAINED),
        margin=experiment.evaluation.margin, margin_stars=experiment.evaluation.margin_stars,
        resamples=experiment.evaluation.resamples, seed=experiment.seeds[0],
    )
    exclusions: Counter[str] = Counter()
    left_out: Counter[str] = Counter()  # by what learned from others: each seed's own, so the sum
    orders = set()
    for seed in experiment.seeds:
        population = open_population(experiment, seed)
        exclusions |= population.exclusions()  # files tell the same for every seed: the most, not the sum
        orders.add(population.order)
        left_out.update(SharedAdapters(run, seed).left_out())
    if experiment.drift.kind != "none":
        run.write_truth(rows for seed in experiment.seeds for rows in FromWorld(experiment, seed).truth())
    commits = [run.committed(seed, round) for seed in experiment.seeds for round in range(experiment.rounds)]
    run.write_json("summary.json", {
        "rows": rows,
        "facts": {
            "exclusions": dict(sorted((exclusions + left_out).items())),
            "order": "time" if orders == {"time"} else "unknown",
            "cloud": dict(cloud),
            "unseen": _unseen(run.read("predictions", ("arm", "task", "user_id", "prediction", "gold"))),
            "answers": _answers(run.read("events", ASKED)),
            "failures": [failure for commit in commits if commit for failure in commit["facts"]["failures"]],
            "placebos": _counted(commits, PLACEBOS),
            "context": _counted(commits, CONTEXT),
        },
    })
    environment = run.read_json("environment.json") or {}
    models = {name: value for commit in commits if commit for name, value in commit["facts"]["models"].items()}
    templates = {
        name: json.loads(facts)  # how prompts were written, by model, as the workers said
        for commit in commits if commit for name, facts in commit["facts"].get("written", {}).items()
    }  # fmt: skip
    ended = {
        "models": models, "templates": templates, "cloud": dict(cloud),
        "ended": WallClock().timestamp(),
    }  # fmt: skip
    run.write_json("environment.json", {**environment, **ended})
    write_report(run)
    run.write_json("environment.json", {**environment, **ended, "usage": usage.facts()})
    run.drop_parts()


def _counted(commits: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> dict[str, int]:
    return {name: int(sum(commit["facts"]["totals"].get(name, 0) for commit in commits if commit)) for name in names}


def _unseen(predictions: pd.DataFrame) -> dict[str, Any]:
    """Tasks whose golds the official ROUGE hardly sees: how many, and what ROUGE over any script says of each arm."""
    found: dict[str, Any] = {}
    for task, rows in predictions[predictions["gold"].notna()].groupby("task"):
        if "rouge1" not in get_task(str(task)).metrics:
            continue
        golds = rows.drop_duplicates(["user_id", "gold"])["gold"]
        unseen = int(golds.map(mostly_unseen).sum())
        if unseen:
            scores = [unicode_rouge(p or "", g) for p, g in zip(rows["prediction"], rows["gold"], strict=True)]
            means = pd.DataFrame(scores, columns=["rouge1", "rougeL"]).groupby(rows["arm"].to_numpy()).mean()
            found[str(task)] = {"unseen": unseen, "golds": len(golds), "rouge": means.round(4).to_dict("index")}
    return found


def _answers(events: pd.DataFrame) -> dict[str, int]:
    """How many answers of the cloud there were, those that could not be used, and those cut before they began."""
    asked = events[events["kind"].isin(("augment", "answer"))]
    detail = asked["detail"].fillna("")
    return {
        "attempts": len(asked),
        "unusable": int((asked["outcome"] == "malformed").sum()),
        "cut": int(detail.str.contains(CUT, regex=False).sum()),
    }
