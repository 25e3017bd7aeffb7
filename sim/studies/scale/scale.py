"""The analysis `scale`: the resources that a growing fleet takes of this machine, and the service it gets of one cloud.

Axes: `fleet` (variants that set `population.users`, and `engine.learners` where not all learn) and `cloud` (variants of
its capacity). The first cell of each size makes all its adapters itself, so the simulation's own time and memory are
read from it alone; what a device costs, from those in which all devices learn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from untether.sim.core.clock import DAY_S, HOUR_S
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ALONE, FLOOR, METHOD
from untether.sim.population.source import open_population
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.rounds.learners import Learners
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.frames import USER, Runs, each_cell, mean_interval, user_scores
from untether.sim.studies.scale.figures import draw_quality, draw_service, draw_simulation
from untether.sim.studies.scale.prose import findings, notes
from untether.sim.studies.study import Study
from untether.sim.time.service import (
    DEVICE,
    cost,
    first_live,
    reached_s,
    share_rate_limited,
    survival,
    throughput_per_s,
    trainings,
    waiting_s,
)
from untether.sim.time.timeline_state import SAMPLES

SHARES = (0.5, 0.9, 0.99)
"""Of the devices, that have their first personalized adapter."""

EVENTS = (
    "seed", "round", "time_s", "request_id", "attempt", "device_id", "arm", "kind", "outcome", "duration_s",
    "tokens_in", "tokens_out", "queued_s", "detail",
)  # fmt: skip
"""Columns that are read: the others are many bytes of a large fleet."""

LENGTHS = (3, 5, 8, 12, 16)
"""History lengths that are looked at together: from one to the next."""


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes the table (a row a cell), three figures and the findings."""
    cells = measure(study, runs)
    quality = by_history(study, runs)
    write_table(out, cells)
    save_figure(out, "1-simulation", draw_simulation(cells), "Time, processor time and memory of the simulation")
    save_figure(out, "2-cloud", draw_service(cells), "Waiting for the cloud, and for the first personalized adapter")
    save_figure(out, "3-history", draw_quality(quality), "Gain over the frozen base by the length of the history")
    write_findings(study, out, findings(cells, quality), notes(cells))


def measure(study: Study, runs: Runs) -> pd.DataFrame:
    """Returns a row a cell: figures of the simulation and of the service.

    Simulation: `wall_s`, `cpu_s`, `peak_memory_gib`; only where it made its adapters itself (`cold`); `learners`: how
    many devices learned. Service: queue quantiles, throughput, refusals, tokens, money, time to an adapter.
    """
    rows, seen = [], set()
    for cell, run in each_cell(study, runs):
        experiment = cell.experiment
        users, seeds = experiment.population.users, len(experiment.seeds)
        devices, learners = users * seeds, experiment.engine.learning(users) * seeds
        usage = (run.read_json("environment.json") or {}).get("usage", {})
        cold = devices not in seen
        seen.add(devices)
        row = {**cell.words, "devices": devices, "learners": learners, "cold": cold, **service(run, experiment)}
        row |= {"wall_s": usage.get("wall_s"), "cpu_s": usage.get("cpu_s")}
        row["peak_memory_gib"] = usage.get("peak_memory_bytes", np.nan) / 2**30
        rows.append(row)
    return pd.DataFrame(rows)


def service(run: RunDirectory, experiment: Experiment) -> dict[str, float]:
    """Returns the service that the fleet got of its cloud, in virtual time. Times to an adapter are inf without one."""
    events = run.read("events", EVENTS)
    asked = events[events["kind"] == "augment"]
    waited = waiting_s(asked)
    overall, busiest = throughput_per_s(asked, bin_s=60.0)
    attempts, requests = share_rate_limited(asked)
    paid = cost(asked, experiment.cloud.capacity)
    made = trainings(events, METHOD)
    devices = pd.concat([run.read("metrics", DEVICE), events[DEVICE]]).drop_duplicates()
    first = first_live(made[made["on"] == SAMPLES], devices, experiment.rounds * DAY_S)
    curve = survival(first["time_s"], first["seen"])
    last = asked.sort_values("attempt").groupby(["seed", "request_id"])["outcome"].last()
    return {
        **{f"queued_p{round(100 * q)}_s": value for q, value in waited.items()},
        "answers_per_s": overall, "busiest_answers_per_s": busiest, "rate_limited_attempts": attempts,
        "rate_limited_requests": requests, "answered": float((last == "ok").mean()) if len(last) else np.nan,
        "tokens_in": paid.tokens_in, "tokens_out": paid.tokens_out, "money": paid.money,
        **{f"h_to_{round(100 * share)}": reached_s(curve, share) / HOUR_S for share in SHARES},
    }  # fmt: skip


def by_history(study: Study, runs: Runs) -> pd.DataFrame:
    """Returns the gain of `local` and `collaborative` over `frozen`, by the length of the user's history.

    It is that of the largest fleet with the first cloud: columns arm, task, least, most, gain, low, high, users. More
    is better, whatever the metric.
    """
    largest = max(study.cells, key=lambda cell: cell.experiment.population.users).experiment.population.users
    cell, run = next((c, r) for c, r in each_cell(study, runs) if c.experiment.population.users == largest)
    scores = user_scores(run.read("predictions"))
    lengths = _lengths(cell.experiment)
    rows = []
    for task, own in scores.groupby("task"):
        wide = own.pivot(index=USER, columns="arm", values="score")
        sign = 1 if higher_is_better(get_task(task).primary) else -1
        length = pd.Series([lengths[user] for _, user, _ in wide.index], index=wide.index)
        for arm in [name for name in (ALONE, METHOD) if name in wide]:
            gain = sign * (wide[arm] - wide[FLOOR])
            for least, above in zip(LENGTHS, (*LENGTHS[1:], np.inf), strict=True):
                some = gain[(length >= least) & (length < above)].dropna()
                if len(some):
                    mean, low, high = mean_interval(some)
                    most = int(length[some.index].max())
                    rows.append((arm, task, least, most, mean, low, high, len(some)))
    return pd.DataFrame(rows, columns=["arm", "task", "least", "most", "gain", "low", "high", "users"])


def _lengths(experiment: Experiment) -> dict[str, float]:
    """History items a task, by user."""
    found = {}
    for seed in experiment.seeds:
        population = open_population(experiment, seed)
        for index in Learners(experiment, seed, len(population)).devices:
            user = population.user(index)
            found[user.user_id] = len(user.history) / len(user.tasks)
    return found
