"""A worker process: it holds the models (base model, encoder) and carries out orders for shards of devices.

The process outlives a run: each call says which run it is for, and a model that the next run shares is not loaded
again. It may die at any moment: the order is carried out again elsewhere, with the same result.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from untether.clients.device.worker import Endpoint, Inputs, Models, Outcome, Worker
from untether.sim.experiment import Experiment
from untether.sim.rounds.messages import Order
from untether.sim.rounds.work import Work, finished


def perform(worker: Worker, order: Order, inputs: Inputs) -> Outcome:
    """Carries out an order. The passes are imported on first use: a host, which imports this module, needs no torch."""
    worker.begin(len(order.devices))
    outcome = _PASSES[order.work]()(worker, order, inputs)
    return replace(outcome, work=finished(worker.work, len(order.devices)))


def _fetch() -> Callable[..., Outcome]:
    from untether.clients.device.fetch import fetch

    return fetch


def _filter() -> Callable[..., Outcome]:
    from untether.clients.device.fetch import filter_again

    return filter_again


def _learn() -> Callable[..., Outcome]:
    from untether.clients.device.learn import learn

    return learn


def _share() -> Callable[..., Outcome]:
    from untether.clients.device.sharing.disjoint import train_shared

    return train_shared


def _begin() -> Callable[..., Outcome]:
    from untether.clients.device.sharing.federated import begin

    return begin


def _update() -> Callable[..., Outcome]:
    from untether.clients.device.sharing.federated import update

    return update


_PASSES: dict[str, Callable[[], Callable[..., Outcome]]] = {
    "fetch": _fetch, "filter": _filter, "learn": _learn, "share": _share, "begin": _begin,
    "update": _update,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Post:
    """What every call tells the worker process.

    Args:
        run: The run's id.
        experiment: As TOML.
        endpoint: Where the cloud is.
        scratch: A folder for what could be requested again; the process makes one of its own where it does not exist.
        threads: Torch threads.
        number: The worker's number among all workers.
    """

    run: str
    experiment: str
    endpoint: Endpoint
    scratch: str
    threads: int = 0
    number: int = 0


class WorkerProcess:
    """The state of a worker process (a Ray actor): its models, and a worker for the current run."""

    def __init__(self) -> None:
        self._models = Models()
        self._worker: Worker | None = None
        self._post: Post | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def at(self, post: Post) -> Worker:
        """Returns the worker of a run, with this process's models."""
        if self._worker is None or self._post != post:
            scratch = post.scratch
            if not Path(scratch).is_dir():
                self._scratch = tempfile.TemporaryDirectory(prefix="untether-worker-")
                scratch = self._scratch.name
            experiment = Experiment.parse(post.experiment)
            self._worker = Worker(experiment, post.endpoint, scratch, post.threads, self._models, post.number)
            self._post = post
        return self._worker

    def call(self, post: Post, order: Order, inputs: Inputs) -> Outcome:
        """Carries out an order of that run."""
        return perform(self.at(post), order, inputs)

    def look(self) -> Work:
        """Returns how much of the current order is done; answered while the order is carried out."""
        return self._worker.work if self._worker else {}

    def pid(self) -> int:
        """Returns this process's id; that it answers shows that it lives."""
        return os.getpid()
