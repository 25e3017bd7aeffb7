"""A backend without Flower and Ray, for tests and for runs within one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from untether.clients.hosting.executors import Executor
from untether.clients.hosting.host import run_order
from untether.sim.rounds.messages import Order, Reply
from untether.sim.rounds.work import Work
from untether.sim.run.directory import RunDirectory


class InProcessBackend:
    """Several hosts, one after the other, on one executor.

    Args:
        run: The run directory.
        executor: The worker of all hosts.
        hosts: How many.
        backwards: Whether the last host and the last device come first, which changes no result.
    """

    def __init__(self, run: RunDirectory, executor: Executor, hosts: int = 1, backwards: bool = False):
        self.run, self.executor, self.hosts, self._turn = run, executor, hosts, -1 if backwards else 1

    def send(self, order: Order, progress: Callable[[Work], None]) -> list[Reply]:
        """Carries out an order on every host, as `sim.rounds.loop.Backend` describes."""
        replies, done = [], 0
        for own in list(order.split(self.hosts).values())[:: self._turn]:
            replies.append(run_order(self.executor, self.run, replace(own, devices=own.devices[:: self._turn])))
            done += len(own.devices)
            progress({"devices": float(done)})
        return replies
