"""Flower as a backend: orders go out as messages to its nodes, which host devices, and replies come back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from untether.server.backends.exchange import exchange, nodes
from untether.sim.rounds.flower_records import order_from, reply_from, to_records
from untether.sim.rounds.messages import Order, Reply, Update
from untether.sim.rounds.work import Work, added, read
from untether.sim.run.directory import RunDirectory
from untether.strategies import FleetStrategy


class OpenEndpoint(Protocol):
    """Where devices ask the cloud."""

    @property
    def base_url(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def limit_s(self) -> float: ...


class FlowerBackend:
    """The nodes of a grid, as the strategy addresses them. `name`: the run's in messages. `threads`: of torch, a
    worker's.

    Raises ResumableStop when `stop` is set, or where nodes do not register in time.
    """

    def __init__(
        self, grid: Grid, run: RunDirectory, name: str, strategy: FleetStrategy, cloud: OpenEndpoint, threads: int,
        stop: threading.Event,
    ):  # fmt: skip
        self.grid, self.run, self.strategy, self.stop = grid, run, strategy, stop
        engine = run.experiment.engine
        self._deadline_s = 2 * engine.deadline_s  # a host, which waits for a worker that long, says so first
        self._told = ConfigRecord({
            "id": name, "experiment": run.experiment.to_toml(), "base_url": cloud.base_url, "model": cloud.model,
            "fingerprint": cloud.fingerprint, "limit_s": cloud.limit_s, "threads": threads,
        })  # fmt: skip
        found = nodes(grid, max(1, engine.hosts), self._deadline_s, stop)
        kind = f"{MessageType.QUERY}.hello"
        hello = [Message(RecordDict(), dst_node_id=node, message_type=kind) for node in found]
        hosts = exchange(grid, hello, self._deadline_s, stop)
        strategy.hosts = {int(m.content["host"]["partition"]): m.metadata.src_node_id for m in hosts}

    def send(self, order: Order, progress: Callable[[Work], None]) -> list[Reply]:
        """Sends as `sim.rounds.loop.Backend` says. A host that fails in training together is a straggler with all its
        devices.
        """
        messages = self._messages(order)
        for message in messages:
            message.content["run"] = self._told
        together = isinstance(order, Update)
        watch = _Watch(self.run, progress)
        replies = exchange(self.grid, messages, self._deadline_s, self.stop, watch, forgiving=together)
        return [
            reply_from(reply.content) if reply is not None else _failed(message)
            for message, reply in zip(messages, replies, strict=True)
        ]

    def _messages(self, order: Order) -> list[Message]:
        if not isinstance(order, Update):
            return self.strategy.messages(f"{MessageType.QUERY}.{order.work}", order)
        records = to_records(order)
        arrays = records.get("arrays", ArrayRecord())
        return list(self.strategy.configure_train(order.round, arrays, records["order"], self.grid))


def _failed(message: Message) -> Reply:
    """What is known of the devices of a host that did not answer."""
    devices = order_from(message.content).devices
    return Reply({"device": list(devices), "outcome": ["host_failed"] * len(devices)})


class _Watch:
    """Sums what the hosts have finished, from the small files they leave, and tells the progress display."""

    def __init__(self, run: RunDirectory, progress: Callable[[Work], None]):
        self.folder, self.progress = run.path / "state" / "progress", progress
        self._read: dict[str, Work] = {}
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)

    def __call__(self) -> object:
        """What is done, and which workers died: while this changes, no host hangs."""
        for path in self.folder.glob("*.done"):
            with contextlib.suppress(OSError):
                self._read[path.name] = read(path.read_text())
        done = added(self._read.values())
        self.progress(done)
        return done, [path.stat().st_size for path in sorted(self.folder.glob("*.deaths"))]
