"""What the passes work with: the experiment, its users, the models of this process; and what they give back.

A worker keeps nothing that counts: what a pass needs of a device's store comes with its order, and what it made goes
back with the reply. So a worker may die at any moment, and need not see anybody's disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from untether.clients.device.device import Device
from untether.clients.stores.adapter_store import State
from untether.sim.experiment import Experiment
from untether.sim.population.source import Population, device_id, open_population
from untether.sim.rounds.messages import Order, Reply, Version
from untether.sim.time.timeline import Timeline

if TYPE_CHECKING:
    from untether.clients.engine.base import FrozenBase
    from untether.clients.filters.embedding import Encoder
    from untether.clients.stores.byte_store import ByteStore


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the devices' store holds of what an order names: private, between store and worker.

    `samples`, `answers`: rows of the devices concerned (None: nothing was left). `adapters`: those of earlier rounds
    that may answer; `starts`: what those that are trained now go on from. `private`: by device, what it keeps for
    itself of what the strategy has devices train together.
    """

    samples: pa.Table | None = None
    answers: pa.Table | None = None
    adapters: Mapping[Version, State] = field(default_factory=dict)
    starts: Mapping[Version, State] = field(default_factory=dict)
    private: Mapping[int, State] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The reply, and what the devices' store is to keep: rows by table, and adapters by the name under which they are
    kept and device id.
    """

    reply: Reply
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, State]] = field(default_factory=dict)


def rows_of(table: pa.Table | None) -> list[dict[str, Any]]:
    """The rows of a table that may not be there."""
    return table.to_pylist() if table is not None else []


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the cloud is: the configured endpoint, or the gateway that the run itself serves."""

    base_url: str
    model: str
    fingerprint: str = ""


class Models:
    """The heavy things of a process, loaded on first use: one base model and one encoder, the last ones asked for."""

    def __init__(self) -> None:
        self._held: dict[type, tuple[tuple[str, ...], Any]] = {}

    def base(self, name: str, dtype: str, device: str, template_args: Mapping[str, Any] | None = None) -> FrozenBase:
        """The frozen on-device model; `template_args` are what its chat template is given."""
        from untether.clients.base_model import resolve
        from untether.clients.engine.base import FrozenBase

        given = dict(template_args or {})
        return self._hold(
            FrozenBase, (name, dtype, device, json.dumps(given, sort_keys=True)),
            lambda: FrozenBase.load(resolve(name), dtype, device, template_args=given),
        )  # fmt: skip

    def encoder(self, name: str, device: str, folder: str) -> Encoder:
        """The sentence encoder of the filters; `folder` keeps its vectors."""
        from untether.clients.filters.embedding import Encoder

        return self._hold(Encoder, (name, device, folder), lambda: Encoder(name, device=device, folder=folder))

    def _hold(self, kind: type, key: tuple[str, ...], load: Callable[[], Any]) -> Any:
        if kind not in self._held or self._held[kind][0] != key:
            self._held.pop(kind, None)  # before the next one needs its memory
            self._held[kind] = key, load()
        return self._held[kind][1]


class Worker:
    """Runs passes of one run.

    `models` are those of its process, which other runs may share. `scratch` is a folder for what would only be asked
    for again: answers of the cloud. `done`: how many devices of its order are, about.
    """

    def __init__(
        self, experiment: Experiment, endpoint: Endpoint, scratch: str | Path, threads: int = 0,
        models: Models | None = None, number: int = 0,
    ):  # fmt: skip
        # oneDNN keeps the code of the last 1024 shapes of products, and PyTorch's own cache before it 1024 again, some
        # 0.3 GiB each, which fill up over tens of rounds. The passes of one turn need some hundreds, which come back.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.experiment = experiment
        self.endpoint = endpoint
        self.scratch = Path(scratch)
        self.models = models or Models()
        self.done = 0.0
        self._number = number
        self._population: tuple[int, Population] | None = None
        self._timeline: Timeline | None = None
        self._answers: ByteStore | None = None

    @property
    def device(self) -> str:
        """Where models run: the experiment's choice; of several GPUs, workers take one in turn."""
        import torch

        chosen, gpus = self.experiment.engine.device, torch.cuda.device_count()
        return f"cuda:{self._number % gpus}" if chosen != "cpu" and gpus > 1 else chosen

    @property
    def base(self) -> FrozenBase:
        """The frozen on-device model."""
        model = self.experiment.model
        return self.models.base(model.base, model.dtype, self.device, model.template_args)

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder of the filters."""
        engine = self.experiment.engine
        return self.models.encoder(self.experiment.filters.encoder, self.device, engine.cache)

    @property
    def answers(self) -> ByteStore | None:
        """What devices answered in this or other runs, where `engine.cache` keeps it."""
        folder = self.experiment.engine.cache
        if folder and self._answers is None:
            from untether.clients.stores.byte_store import ByteStore

            self._answers = ByteStore(Path(folder).expanduser() / "decoded.sqlite")
        return self._answers

    def population(self, seed: int) -> Population:
        """The users of a seed; one seed is held at a time."""
        if self._population is None or self._population[0] != seed:
            self._population = (seed, open_population(self.experiment, seed))
        return self._population[1]

    def timeline(self, seed: int, measured: str = "{}") -> Timeline:
        """The virtual time of a seed's devices, for what an answer takes; one seed is held at a time. `measured` is the
        order's.
        """
        if self._timeline is None or self._timeline.seed != seed:
            self._timeline = Timeline(self.experiment, seed, device_id, json.loads(measured))
        return self._timeline

    def devices(self, order: Order) -> list[Device]:
        """The order's devices, in its order."""
        population = self.population(order.seed)
        return [Device(index, population.user(index)) for index in order.devices]

    def progress(self, done: float) -> None:
        """Says how many devices of the order are done; whoever watches looks at `done`."""
        self.done = done
