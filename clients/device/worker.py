"""What the passes work with: the experiment, its users and the models of this process; and the types of their results.

A worker keeps no state that matters: an order brings what a pass needs of the devices' store, and the reply takes back
what it made. So a worker may die at any moment, and needs no access to any disk.
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
from untether.clients.stores.adapter_store import AdapterArrays
from untether.sim.experiment import Experiment
from untether.sim.population.source import Population, device_id, open_population
from untether.sim.rounds.messages import Order, Reply, Version
from untether.sim.rounds.work import Work
from untether.sim.time.timeline import Timeline
from untether.sim.time.wall import timeline_of

if TYPE_CHECKING:
    from untether.clients.engine.base import FrozenBase
    from untether.clients.filters.embedding import Encoder
    from untether.clients.stores.byte_store import ByteStore


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the devices' store holds for an order: private data, exchanged between store and worker only.

    Args:
        samples: Rows of samples of the devices concerned; None where there are none.
        answers: Rows of the cloud's answers, likewise.
        adapters: Adapters of earlier rounds that may answer.
        starts: Adapters that this round's training continues from.
        private: By device, what it keeps for itself of what the strategy has devices train together.
    """

    samples: pa.Table | None = None
    answers: pa.Table | None = None
    adapters: Mapping[Version, AdapterArrays] = field(default_factory=dict)
    starts: Mapping[Version, AdapterArrays] = field(default_factory=dict)
    private: Mapping[int, AdapterArrays] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a pass: the reply, and what the devices' store keeps.

    Args:
        reply: The reply.
        rows: Rows by table.
        adapters: Adapters by the name under which they are kept and device id.
        work: What was done, as counted (`sim.rounds.work`).
    """

    reply: Reply
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, AdapterArrays]] = field(default_factory=dict)
    work: Work = field(default_factory=dict)


def rows_of(table: pa.Table | None) -> list[dict[str, Any]]:
    """Returns the rows of a table; none where the table is None."""
    return table.to_pylist() if table is not None else []


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the cloud is: the configured endpoint, or the gateway that the run itself serves. `limit_s`: how long a
    request may take by the speed that was measured there; it lengthens `cloud.timeout_s`.
    """

    base_url: str
    model: str
    fingerprint: str = ""
    limit_s: float = 0.0


class Models:
    """The models of a process, loaded on first use: one base model and one encoder, those asked for last."""

    def __init__(self) -> None:
        self._held: dict[type, tuple[tuple[str, ...], Any]] = {}

    def base(self, name: str, dtype: str, device: str, template_args: Mapping[str, Any] | None = None) -> FrozenBase:
        """Returns the frozen on-device model; `template_args` are the arguments of its chat template."""
        from untether.clients.base_model import resolve
        from untether.clients.engine.base import FrozenBase

        given = dict(template_args or {})
        return self._hold(
            FrozenBase, (name, dtype, device, json.dumps(given, sort_keys=True)),
            lambda: FrozenBase.load(resolve(name), dtype, device, template_args=given),
        )  # fmt: skip

    def encoder(self, name: str, device: str, folder: str, dtype: str = "auto") -> Encoder:
        """Returns the sentence encoder of the filters; `folder` keeps its vectors."""
        from untether.clients.filters.embedding import Encoder

        key = name, device, folder, dtype
        return self._hold(Encoder, key, lambda: Encoder(name, dtype=dtype, device=device, folder=folder))

    def _hold(self, kind: type, key: tuple[str, ...], load: Callable[[], Any]) -> Any:
        if kind not in self._held or self._held[kind][0] != key:
            self._held.pop(kind, None)  # before the next one needs its memory
            self._held[kind] = key, load()
        return self._held[kind][1]


class Worker:
    """Carries out the passes of one run.

    Args:
        experiment: The run's experiment.
        endpoint: Where the cloud is.
        scratch: A folder for what could be requested again: answers of the cloud.
        threads: Torch threads; 0 is torch's choice.
        models: The models of this process, which other runs may share.
        number: This worker's number, which picks its GPU.
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
        self.work: Work = {}
        self._devices = 0
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
        dtype = "bfloat16" if self.experiment.model.dtype == "mixed" else "auto"
        return self.models.encoder(self.experiment.filters.encoder, self.device, self.experiment.engine.cache, dtype)

    @property
    def answers(self) -> ByteStore | None:
        """What devices answered in this or other runs, where `engine.cache` keeps it."""
        folder = self.experiment.engine.cache
        if folder and self._answers is None:
            from untether.clients.stores.byte_store import ByteStore

            self._answers = ByteStore(Path(folder).expanduser() / "decoded.sqlite")
        return self._answers

    def population(self, seed: int) -> Population:
        """Returns the users of a seed. One seed is held at a time."""
        if self._population is None or self._population[0] != seed:
            self._population = (seed, open_population(self.experiment, seed))
        return self._population[1]

    def timeline(self, seed: int, measured: str = "{}") -> Timeline:
        """Returns the virtual time of a seed's devices, which gives durations of answers; one seed is held at a time.

        Args:
            seed: The seed.
            measured: The measured profile of this machine as JSON, as the order has it.
        """
        if self._timeline is None or self._timeline.seed != seed:
            self._timeline = timeline_of(self.experiment, seed, device_id, json.loads(measured))
        return self._timeline

    def devices(self, order: Order) -> list[Device]:
        """Returns the order's devices, in its order."""
        population = self.population(order.seed)
        return [Device(index, population.user(index)) for index in order.devices]

    def begin(self, devices: int) -> None:
        """Records that an order for so many devices begins."""
        self.work, self._devices = {"devices": 0.0}, devices

    def progress(self, done: float, **counts: float) -> None:
        """Records how many devices of the order are done, about, and what is counted; observers read the attribute
        `work` (`sim.rounds.work`).
        """
        of = {f"{name.removesuffix('_due')}_of": float(self._devices) for name in counts if name.endswith("_due")}
        self.work = {**self.work, **counts, **of, "devices": done}
