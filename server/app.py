"""The Flower ServerApp: the round loop, on one screen. Everything else is called from it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from server.cloud import open_cloud
from server.exchange import exchange, nodes
from sim.errors import Failure
from sim.finish import finish
from sim.population.source import open_population
from sim.results import RunDirectory
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
    with open_cloud(experiment, run) as cloud:
        found = nodes(grid, max(1, experiment.engine.hosts), deadline_s, stop)
        hosts = exchange(grid, _hello(found), deadline_s, stop)
        done = sum(run.committed(s, r) is not None for s in experiment.seeds for r in range(experiment.rounds))
        progress.start(experiment.seeds, experiment.rounds, done)
        strategy.hosts = {int(m.content["host"]["partition"]): m.metadata.src_node_id for m in hosts}
        for seed in experiment.seeds:
            devices = list(range(len(open_population(experiment, seed))))
            for round in range(experiment.rounds):
                if run.committed(seed, round):
                    continue
                progress.begin(seed, round)
                order = {
                    "run": str(run.path.resolve()), "base_url": cloud.base_url, "model": cloud.model,
                    "fingerprint": cloud.fingerprint, "threads": threads, "deadline_s": experiment.engine.deadline_s,
                    "seed": seed, "round": round, "devices": devices, "samples": [],
                }

                # 1. plan: who takes part. 2. fetch: ask the cloud, filter what it wrote.
                watch = _Watch(run, "fetch", len(devices), progress)
                messages = strategy.configure_fetch(round, ConfigRecord(order), grid)
                asked = exchange(grid, messages, deadline_s, stop, watch)
                parts = _gather(asked)

                # 3. share: the adapters that belong to no device, once a seed.
                if "shared" in experiment.arms and round == 0:
                    exchange(grid, _share(strategy.hosts, order), deadline_s, stop)

                # 4. learn: train, answer, score.
                order["samples"] = parts.get("samples", [])
                watch = _Watch(run, "learn", len(devices), progress)
                messages = strategy.configure_train(round, arrays, ConfigRecord(order), grid)
                learned = exchange(grid, messages, deadline_s, stop, watch)
                _, totals = strategy.aggregate_train(round, learned)

                # 5. commit: what is not named here never happened.
                _complete(devices, learned)
                for table, paths in _gather(learned).items():
                    parts.setdefault(table, []).extend(paths)
                replies = [*asked, *learned]
                models = {name: value for reply in replies for name, value in _result(reply, "models").items()}
                failures = [failure for reply in replies for failure in _result(reply, "failures")]
                run.commit(seed, round, parts, {"totals": dict(totals or {}), "models": models, "failures": failures})
                progress.end()
        truth = cloud.truth()
    finish(run, truth, cloud.facts())


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
    content = RecordDict({"order": ConfigRecord(order)})
    return [Message(content, dst_node_id=hosts[min(hosts)], message_type=f"{MessageType.QUERY}.share")]


def _gather(replies: Sequence[Message]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for reply in replies:
        for table, paths in _result(reply, "parts").items():
            parts.setdefault(table, []).extend(paths)
    return parts


def _complete(devices: Sequence[int], replies: Sequence[Message]) -> None:
    """Raises Failure if a device of the plan is in no reply: a round is committed whole."""
    missing = set(devices).difference(*(reply.content["devices"].get("device", []) for reply in replies))
    if missing:
        raise Failure(f"{len(missing)} of {len(devices)} devices are in no host's reply, such as {min(missing)}")


def _result(reply: Message, name: str) -> Any:
    return json.loads(str(reply.content["result"][name]))
