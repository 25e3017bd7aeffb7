"""The Flower ServerApp: the round loop, on one screen. Everything else is called from it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from server.cloud import open_cloud
from server.exchange import exchange, nodes
from server.replies import complete, errors, gather, materials, result
from sim.finish import finish
from sim.population.source import open_population
from sim.results import RunDirectory
from sim.rounds import Rounds, sizes_of
from sim.usage import Usage
from strategies import make_strategy


class Progress(Protocol):
    """Who watches a run."""

    def start(self, seeds: Sequence[int], rounds: int, rounds_done: int) -> None: ...

    def begin(self, seed: int, round: int) -> None: ...

    def update(self, stage: str, done: int, total: int) -> None: ...

    def end(self) -> None: ...


def coordinate(grid: Grid, run: RunDirectory, threads: int, progress: Progress, stop: threading.Event) -> None:
    """Runs every round that is not committed yet, then turns the run directory into tables and a report.

    Raises UserError, ResumableStop (interrupt, unreachable cloud, full disk: resume goes on) and Failure.
    """
    experiment = run.experiment
    strategy = make_strategy(experiment.strategy.name)
    deadline_s = 2 * experiment.engine.deadline_s  # a host, which waits for a worker that long, says so first
    arrays = ArrayRecord()
    with Usage() as usage, open_cloud(experiment, run) as cloud:
        found = nodes(grid, max(1, experiment.engine.hosts), deadline_s, stop)
        hosts = exchange(grid, _hello(found), deadline_s, stop)
        done = sum(run.committed(s, r) is not None for s in experiment.seeds for r in range(experiment.rounds))
        progress.start(experiment.seeds, experiment.rounds, done)
        strategy.hosts = {int(m.content["host"]["partition"]): m.metadata.src_node_id for m in hosts}
        for seed in experiment.seeds:
            population = open_population(experiment, seed)
            devices = list(range(len(population)))
            rounds = [round for round in range(experiment.rounds) if not run.committed(seed, round)]
            virtual = Rounds(experiment, seed, population, run.carried(seed, rounds[0] - 1)) if rounds else None
            for round in rounds:
                progress.begin(seed, round)
                order = {
                    "run": str(run.path.resolve()), "base_url": cloud.base_url, "model": cloud.model,
                    "fingerprint": cloud.fingerprint, "threads": threads, "deadline_s": experiment.engine.deadline_s,
                    "seed": seed, "round": round, "devices": devices,
                }

                # 1. plan: who asks and trains, and whose requests get through.
                agenda = virtual.plan(round, devices)

                # 2. fetch: ask the cloud, filter what it wrote.
                watch = _Watch(run, "fetch", len(agenda.asking), progress)
                asking = ConfigRecord({**order, **agenda.order(), "devices": agenda.asking})
                asked = exchange(grid, strategy.configure_fetch(round, asking, grid), deadline_s, stop, watch)
                parts = gather(asked)

                # 3. schedule: when everything ends, from what it really took.
                answers = run.read_rows(parts.pop("events", []))
                day = virtual.schedule(agenda, sizes_of(answers), materials(asked))
                if "shared" in experiment.arms and round == 0:  # the adapters that belong to no device, once a seed
                    watch = _Watch(run, "share", experiment.population.shared_users, progress)
                    exchange(grid, _share(strategy.hosts, order), deadline_s, stop, watch)

                # 4. learn: train, answer, score.
                watch = _Watch(run, "learn", len(devices), progress)
                staged = {"sample_parts": run.sample_parts(seed, round, parts)}
                staged["answer_parts"] = parts.pop("answers", [])
                learning = ConfigRecord({**order, **virtual.order(day), **staged})
                messages = strategy.configure_train(round, arrays, learning, grid)
                learned = exchange(grid, messages, deadline_s, stop, watch)
                _, totals = strategy.aggregate_train(round, learned)

                # 5. commit: what is not named here never happened.
                complete(devices, learned)
                for table, paths in gather(learned).items():
                    parts.setdefault(table, []).extend(paths)
                events = virtual.event_rows(day, answers, run.read_rows(parts.pop("events", [])))
                parts["events"] = [run.write_part("events", seed, round, "round", events)]
                virtual.advance(day, errors(learned))
                replies = [*asked, *learned]
                models = {name: value for reply in replies for name, value in result(reply, "models").items()}
                failures = [failure for reply in replies for failure in result(reply, "failures")]
                facts = {"totals": dict(totals or {}), "models": models, "failures": failures}
                carried = virtual.state() if round + 1 < experiment.rounds else None
                run.commit(seed, round, parts, facts, carried)
                progress.end()
        truth = cloud.truth()
        finish(run, truth, cloud.facts(), usage)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry of `flwr run .`: the same run, with the experiment's fields in the run config."""
    from sim.launch import from_run_config

    run, threads, progress = from_run_config(dict(context.run_config))
    coordinate(grid, run, threads, progress, threading.Event())


def make_app(runs: Iterable[tuple[RunDirectory, int]], progress: Progress, stop: threading.Event) -> ServerApp:
    """The ServerApp of in-process runs: coordinates each, with its threads a worker, when the one before has ended.

    `runs` is asked for the next one only then. The first error ends it all.
    """
    in_process = ServerApp()

    @in_process.main()
    def run_here(grid: Grid, context: Context) -> None:
        for run, threads in runs:
            coordinate(grid, run, threads, progress, stop)

    return in_process


class _Watch:
    """Sums what the hosts have finished, from the small files they leave, and tells the progress display."""

    def __init__(self, run: RunDirectory, stage: str, total: int, progress: Progress):
        self.folder, self.stage, self.total = run.path / "state" / "progress", stage, total
        self.progress = progress
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)

    def __call__(self) -> object:
        """What is done, and which workers died: while this changes, no host hangs."""
        done = sum(map(_count, (*self.folder.glob("*.done"), *self.folder.glob("*.shard"))))
        self.progress.update(self.stage, min(int(done), self.total), self.total)
        return done, [path.stat().st_size for path in sorted(self.folder.glob("*.deaths"))]


def _count(path: Path) -> float:
    try:
        return float(path.read_text() or 0)
    except (OSError, ValueError):
        return 0.0


def _hello(nodes: Sequence[int]) -> list[Message]:
    kind = f"{MessageType.QUERY}.hello"
    return [Message(RecordDict(), dst_node_id=node, message_type=kind) for node in nodes]


def _share(hosts: dict[int, int], order: dict) -> list[Message]:
    """One message a host: each trains the adapters of some tasks."""
    kind, messages = f"{MessageType.QUERY}.share", []
    for part, host in enumerate(sorted(hosts)):
        own = ConfigRecord({**order, "part": part, "parts": len(hosts)})
        messages.append(Message(RecordDict({"order": own}), dst_node_id=hosts[host], message_type=kind))
    return messages
