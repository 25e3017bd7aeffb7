"""Flower as a backend: orders go out as messages to its nodes, which host devices, and replies come back."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from untether.server.backends.exchange import EVERYTHING, FAILURE, NOTHING, Lost, exchange, insist, nodes
from untether.sim.core.clock import WallClock
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment.arms import FEDERATED
from untether.sim.population.source import device_id
from untether.sim.rounds.flower_records import order_from, reply_from, to_records
from untether.sim.rounds.messages import Order, Reply, Update
from untether.sim.rounds.work import Work, added, read
from untether.sim.run.directory import RunDirectory, versions
from untether.sim.run.environment import began_s
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
    worker's. Of simulated nodes a failed one ends the run, except in training together; a deployed one costs its
    device the round.

    Raises ResumableStop when `stop` is set, or where nodes do not register in time.
    """

    def __init__(
        self, grid: Grid, run: RunDirectory, name: str, strategy: FleetStrategy, cloud: OpenEndpoint, threads: int,
        stop: threading.Event, hosts: Mapping[int, int] | None = None,
    ):  # fmt: skip
        self.grid, self.run, self.strategy, self.stop = grid, run, strategy, stop
        experiment = run.experiment
        self.deployed = experiment.hardware.clock == "wall"
        self._deadline_s = 2 * experiment.engine.deadline_s  # a host, which waits for a worker that long, says so first
        self._began_s = began_s(run)
        self._told = ConfigRecord({
            "id": name, "experiment": experiment.to_toml(), "base_url": cloud.base_url, "model": cloud.model,
            "fingerprint": cloud.fingerprint, "limit_s": cloud.limit_s, "threads": threads, "began_s": self._began_s,
        })  # fmt: skip
        if not hosts:
            wanted = experiment.population.users if self.deployed else max(1, experiment.engine.hosts)
            hosts = _ids(greet(grid, nodes(grid, wanted, self._deadline_s, stop), self._deadline_s, stop))
        strategy.hosts, self._seen = dict(hosts), list(hosts.values())

    def send(self, order: Order, progress: Callable[[Work], None]) -> list[Reply]:
        """Sends as `sim.rounds.loop.Backend` says. A host that fails in training together is a straggler with all its
        devices.
        """
        there = self._look_around() if self.deployed else None
        if there is not None and not there:
            raise ResumableStop("none of the deployment's nodes is there any more")
        addressed = self._messages(order)
        messages = [m for m in addressed if there is None or m.metadata.dst_node_id in there]
        for message in messages:
            message.content["run"] = self._told
        forgiven = EVERYTHING if self.deployed else {FAILURE} if isinstance(order, Update) else NOTHING
        watch = _Watch(self.run, progress, self.deployed)
        replies = exchange(self.grid, messages, self._deadline_s, self.stop, watch, forgiven)
        if addressed and not order.devices and not any(isinstance(reply, Message) for reply in replies):
            why = "; ".join(reply.why for reply in replies if isinstance(reply, Lost)) or "its node is not there"
            raise ResumableStop(f"nobody carried out the order `{order.work}`, which is one node's: {why}")
        found = [
            self._told_by(order, message, reply) if isinstance(reply, Lost) else self._kept(order, reply)
            for message, reply in zip(messages, replies, strict=True)
        ]
        heard = {device for message in messages for device in order_from(message.content).devices}
        away = [device for device in order.devices if device not in heard]
        return [*found, self._lost(order, away, "node_away", "its node was not there")] if away else found

    def _messages(self, order: Order) -> list[Message]:
        if not isinstance(order, Update):
            return self.strategy.messages(f"{MessageType.QUERY}.{order.work}", order)
        records = to_records(order)
        arrays = records.get("arrays", ArrayRecord())
        return list(self.strategy.configure_train(order.round, arrays, records["order"], self.grid))

    def _look_around(self) -> set[int]:
        """The nodes that are there, those that came back among them: under another id, with the same number."""
        there = sorted(insist(self.grid.get_node_ids))
        if fresh := [node for node in there if node not in self._seen]:
            found = greet(self.grid, fresh, self._deadline_s, self.stop, forgiven=EVERYTHING)
            self.strategy.hosts |= _ids(found)
            self._seen += fresh
        return set(there)

    def _kept(self, order: Order, message: Message) -> Reply:
        """A reply, whose rows are kept in the run directory under the names that the node gave them."""
        reply = reply_from(message.content)
        for table, rows in reply.tables.items():
            for name in reply.parts[table]:
                self.run.write_part(table, order.seed, order.round, name, rows)
        if not self.deployed or not reply.arrays or not reply.columns:
            return reply
        sent = sum(array.nbytes for array in reply.arrays.values())
        events = [self._event(order, device, "upload", "ok", bytes_up=sent) for device in reply.columns["device"]]
        return replace(reply, tables={}, events=[*reply.events, *events])

    def _told_by(self, order: Order, message: Message, lost: Lost) -> Reply:
        return self._lost(order, order_from(message.content).devices, "host_failed", lost.why)

    def _lost(self, order: Order, devices: Sequence[int], outcome: str, why: str) -> Reply:
        """What is known of the devices of a host that did not answer."""
        events = [self._event(order, device, "node_lost", outcome, detail=why) for device in devices]
        return Reply(lost=dict.fromkeys(devices, outcome), events=events if self.deployed else ())

    def _event(self, order: Order, device: int, kind: str, outcome: str, **more: Any) -> dict[str, Any]:
        name = device_id(device)
        return {
            "time_s": WallClock().epoch_s() - self._began_s, "attempt": 0, "device_id": name, "kind": kind,
            "event_id": f"{kind}-s{order.seed}-r{order.round}-{order.work}-{name}", "outcome": outcome,
            "arm": FEDERATED if kind == "upload" else None, **more,
        }  # fmt: skip


def greet(
    grid: Grid, found: Sequence[int], deadline_s: float, stop: threading.Event, asking: str = "",
    forgiven: Collection[str] = NOTHING,
) -> dict[int, Message]:  # fmt: skip
    """Returns what nodes say of themselves, by the number of their partition.

    Args:
        grid, found: The nodes.
        deadline_s, stop, forgiven: As in `exchange`; who is forgiven is left out.
        asking: An experiment, where the nodes are to tell what it needs to know of their users.

    Raises:
        UserError: A node has another version of this program, or the number of another one.
    """
    content = RecordDict({"run": ConfigRecord({"experiment": asking})} if asking else {})
    hello = [Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.hello") for node in found]
    hosts: dict[int, Message] = {}
    for message in exchange(grid, hello, deadline_s, stop, forgiven=forgiven):
        if isinstance(message, Lost):
            continue
        said = message.content["host"]
        number, theirs, here = int(said["partition"]), json.loads(str(said["versions"])), versions()
        if theirs != here:
            raise UserError(
                f"node {number} has {_words(theirs)}, and the server {_words(here)}. Install the same version on both"
            )
        if number in hosts:
            raise UserError(f"two nodes have partition-id={number}. Give each its own in --node-config")
        hosts[number] = message
    return hosts


def _ids(hosts: dict[int, Message]) -> dict[int, int]:
    return {number: message.metadata.src_node_id for number, message in hosts.items()}


def _words(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


class _Watch:
    """Sums what the hosts have finished, from the small files they leave, and tells the progress display. Of deployed
    nodes it knows only who has replied.
    """

    def __init__(self, run: RunDirectory, progress: Callable[[Work], None], deployed: bool):
        self.folder, self.progress, self.deployed = run.path / "state" / "progress", progress, deployed
        self._read: dict[str, Work] = {}
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)

    def __call__(self, replies: int) -> object:
        """What is done, and which workers died: while this changes, no host hangs."""
        if self.deployed:
            self.progress({"devices": float(replies)})
            return replies
        for path in self.folder.glob("*.done"):
            with contextlib.suppress(OSError):
                self._read[path.name] = read(path.read_text())
        done = added(self._read.values())
        self.progress(done)
        return done, [path.stat().st_size for path in sorted(self.folder.glob("*.deaths"))]
