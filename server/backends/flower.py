"""Flower as a backend: orders go out as messages to its nodes, which host devices, and replies come back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from untether.server.backends.exchange import exchange, nodes
from untether.sim.rounds.messages import Reply
from untether.sim.run.directory import RunDirectory
from untether.strategies import FleetStrategy

_FILTER = f"{MessageType.QUERY}.filter"


class FlowerBackend:
    """The nodes of a grid, as the strategy addresses them. `threads`: of torch, a worker.

    Raises ResumableStop when `stop` is set, or where nodes do not register in time.
    """

    def __init__(self, grid: Grid, run: RunDirectory, strategy: FleetStrategy, threads: int, stop: threading.Event):
        self.grid, self.run, self.strategy, self.stop = grid, run, strategy, stop
        engine = run.experiment.engine
        self._deadline_s = 2 * engine.deadline_s  # a host, which waits for a worker that long, says so first
        self._told = {"run": str(run.path.resolve()), "threads": threads, "deadline_s": engine.deadline_s}
        found = nodes(grid, max(1, engine.hosts), self._deadline_s, stop)
        kind = f"{MessageType.QUERY}.hello"
        hello = [Message(RecordDict(), dst_node_id=node, message_type=kind) for node in found]
        hosts = exchange(grid, hello, self._deadline_s, stop)
        strategy.hosts = {int(m.content["host"]["partition"]): m.metadata.src_node_id for m in hosts}

    def send(self, work: str, order: Mapping[str, Any], progress: Callable[[float], None]) -> list[Reply]:
        """See `sim.rounds.loop.Backend`."""
        watch = _Watch(self.run, progress)
        messages = self._messages(work, ConfigRecord({**self._told, **order}))
        replies = exchange(self.grid, messages, self._deadline_s, self.stop, watch)
        if work == "learn":
            self.strategy.aggregate_train(int(order["round"]), replies)
        return [_reply(message) for message in replies]

    def _messages(self, work: str, order: ConfigRecord) -> list[Message]:
        round = int(order["round"])  # type: ignore[arg-type]
        if work == "fetch":
            return list(self.strategy.configure_fetch(round, order, self.grid))
        if work == "learn":
            return list(self.strategy.configure_train(round, ArrayRecord(), order, self.grid))
        if work == "filter":
            return self.strategy.orders(_FILTER, order)
        hosts = self.strategy.hosts
        return [  # each trains the adapters of some tasks
            Message(
                RecordDict({"order": ConfigRecord({**order, "part": part, "parts": len(hosts)})}),
                dst_node_id=hosts[partition], message_type=f"{MessageType.QUERY}.{work}",
            )
            for part, partition in enumerate(sorted(hosts))
        ]  # fmt: skip


def _reply(message: Message) -> Reply:
    said = {name: json.loads(str(value)) for name, value in message.content["result"].items()}
    columns = {name: list(values) for name, values in message.content["devices"].items()}  # type: ignore[arg-type]
    return Reply(columns, said["parts"], said["models"], said["failures"])


class _Watch:
    """Sums what the hosts have finished, from the small files they leave, and tells the progress display."""

    def __init__(self, run: RunDirectory, progress: Callable[[float], None]):
        self.folder, self.progress = run.path / "state" / "progress", progress
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)

    def __call__(self) -> object:
        """What is done, and which workers died: while this changes, no host hangs."""
        done = sum(map(_count, (*self.folder.glob("*.done"), *self.folder.glob("*.shard"))))
        self.progress(done)
        return done, [path.stat().st_size for path in sorted(self.folder.glob("*.deaths"))]


def _count(path: Path) -> float:
    try:
        return float(path.read_text() or 0)
    except (OSError, ValueError):
        return 0.0
