"""A small fleet for the tests of the whole: one experiment, run in process or for real, and what came out of it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pandas as pd

from clients.executors import InProcess
from clients.host import run_pass
from clients.worker import Endpoint, Worker
from sim.experiment import Experiment
from sim.orders import cut
from sim.population.source import open_population
from sim.results import RunDirectory
from sim.rounds import Material, Rounds, sizes_of

COUNTS = [field.name for field in fields(Material)]
KEYS = ["seed", "round", "device_id", "arm", "task", "query_id"]


def tiny(**changes) -> Experiment:
    """Six devices with two tasks that take two optimizer steps; `changes` are dotted fields, dots as `__`."""
    fields = {
        "name": "tiny", "arms": "local,placebo,collaborative,cloud", "population.users": "6", "population.queries": "2",
        "population.tasks": "LaMP_2,LaMP_4", "training.steps": "2", "training.batch_size": "4",
        "generation.max_new_tokens": "6", "cloud.samples": "6", "engine.threads": "1", "engine.workers": "2",
        "evaluation.resamples": "100",
    }  # fmt: skip
    return Experiment.read(None, fields | {key.replace("__", "."): str(value) for key, value in changes.items()})


def run_in_process(
    path: Path, experiment: Experiment, endpoint: Endpoint, hosts: int = 1, worker=None, backwards: bool = False
) -> RunDirectory:
    """The rounds of an experiment without Flower and Ray: the same passes on one worker, host after host.

    `worker` is one that has loaded its models already, to be used again on this run directory. `backwards` names the
    devices to the round loop from the last to the first.
    """
    run = RunDirectory.create(path, experiment)
    fresh = Worker(str(run.path), endpoint, threads=1, models=worker.models if worker is not None else None)
    executor = InProcess(lambda: fresh)
    devices = list(range(experiment.population.users))[:: -1 if backwards else 1]
    for seed in experiment.seeds:
        virtual = Rounds(experiment, seed, open_population(experiment, seed))
        if "shared" in experiment.arms:
            fresh.share(seed)
        for round in range(experiment.rounds):
            agenda = virtual.plan(round, devices)
            parts, replies = _pass(run, executor, "fetch", seed, round, agenda.order(), agenda.asking, hosts)
            events = run.read_rows(parts.pop("events", []))
            columns = [reply["columns"] for reply in replies]
            materials = {
                device: Material(*counts)
                for found in columns for device, *counts in zip(*(found[n] for n in ("device", *COUNTS)), strict=True)
            }  # fmt: skip
            day = virtual.schedule(agenda, sizes_of(events), materials)
            staged = {"sample_parts": run.sample_parts(seed, round, parts), "answer_parts": parts.pop("answers", [])}
            learned, replies = _pass(
                run, executor, "learn", seed, round, {**virtual.order(day), **staged}, devices, hosts
            )
            for table, paths in learned.items():
                parts.setdefault(table, []).extend(paths)
            rows = virtual.event_rows(day, events, run.read_rows(parts.pop("events", [])))
            parts["events"] = [run.write_part("events", seed, round, "round", rows)]
            errors = {
                device: json.loads(found)
                for reply in replies
                for device, found in zip(reply["columns"]["device"], reply["columns"].get("errors", []), strict=False)
            }
            virtual.advance(day, errors)
            run.commit(seed, round, parts, {"failures": [], "models": {}}, virtual.state())
    run.merge(experiment)
    return run


def _pass(run, executor, name, seed, round, order, devices, hosts):
    parts: dict[str, list[str]] = {}
    replies = []
    for host in range(hosts):
        if own := [device for device in devices if device % hosts == host]:
            told = {**cut(order, own), "devices": own, "seed": seed, "round": round}
            shard, progress = run.experiment.engine.shard, run.path / "progress"
            replies.append(run_pass(executor, name, run, told, shard, 600.0, progress))
            for table, paths in replies[-1]["parts"].items():
                parts.setdefault(table, []).extend(paths)
    return parts, replies


def answers(run: RunDirectory) -> pd.DataFrame:
    """What was answered and how it scored, in one order."""
    frame = run.read("predictions").sort_values(KEYS).reset_index(drop=True)
    return frame[[*KEYS, "input", "gold", "prediction", "score", "outcome", "answered_by"]]


def metrics(run: RunDirectory) -> pd.DataFrame:
    """The scores by user, in one order."""
    columns = ["seed", "round", "device_id", "user_id", "arm", "task", "metric", "value", "n"]
    return run.read("metrics")[columns].sort_values(columns[:7]).reset_index(drop=True)


def losses(run: RunDirectory) -> pd.DataFrame:
    """Every loss that was kept, in one order."""
    columns = ["seed", "round", "device_id", "arm", "step", "loss"]
    return run.read("training")[columns].sort_values(columns[:5]).reset_index(drop=True)


def verdicts(run: RunDirectory) -> pd.DataFrame:
    """What became of every sample, in one order."""
    columns = ["seed", "round", "sample_id", "device_id", "task", "input", "output", "verdict", "semantic", "diversity"]
    return run.read("samples")[columns].sort_values(columns[:3]).reset_index(drop=True)
