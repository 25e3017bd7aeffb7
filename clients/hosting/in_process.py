"""Hosts without Flower and Ray: the backend of tests, and of whoever wants a run in this very process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from untether.clients.hosting.executors import Executor
from untether.clients.hosting.host import run_pass
from untether.sim.rounds.messages import Reply
from untether.sim.rounds.orders import cut
from untether.sim.run.directory import RunDirectory


class InProcessBackend:
    """So many hosts, one after the other, on one executor. Device i lives on host i mod `hosts`. `backwards`: the last
    host and the last device come first, which changes nothing.
    """

    def __init__(self, run: RunDirectory, executor: Executor, hosts: int = 1, backwards: bool = False):
        self.run, self.executor, self.hosts, self._turn = run, executor, hosts, -1 if backwards else 1

    def send(self, work: str, order: Mapping[str, Any], progress: Callable[[float], None]) -> list[Reply]:
        """See `sim.rounds.loop.Backend`."""
        engine = self.run.experiment.engine
        if work == "share":
            for part in range(self.hosts):
                self.executor.call("share", order["seed"], part, self.hosts, deadline_s=engine.deadline_s)
            return []
        replies, done = [], 0
        for host in range(self.hosts)[:: self._turn]:
            if own := [device for device in order["devices"] if device % self.hosts == host][:: self._turn]:
                told = {**cut(order, own), "devices": own}
                place = self.run.path / "state" / "progress" / f"{host}.done"
                found = run_pass(
                    self.executor, work, self.run, told, engine.shard, engine.deadline_s, place, engine.strict
                )
                replies.append(Reply(**found))
                done += len(own)
                progress(done)
        return replies
