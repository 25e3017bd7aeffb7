"""What the passes of a shard work with: the run's experiment, users and store, and the models of this process.

Everything here can be rebuilt from the run directory, so a worker may die at any moment.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untether.clients.device.device import Device, Shard
from untether.sim.population.source import Population, device_id, open_population
from untether.sim.run.directory import RunDirectory
from untether.sim.time.timeline import Timeline

if TYPE_CHECKING:
    from untether.clients.engine.base import FrozenBase
    from untether.clients.filters.embedding import Encoder
    from untether.clients.stores.adapter_store import AdapterStore
    from untether.clients.stores.byte_store import ByteStore


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
    """Runs shards of one run; `models` are those of its process, which other runs may share."""

    def __init__(
        self, run_directory: str, endpoint: Endpoint, threads: int = 0, progress: str = "",
        models: Models | None = None, number: int = 0,
    ):  # fmt: skip
        # oneDNN keeps the code of the last 1024 shapes of products, and PyTorch's own cache before it 1024 again, some
        # 0.3 GiB each, which fill up over tens of rounds. The passes of one turn need some hundreds, which come back.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.run = RunDirectory.open(run_directory)
        self.experiment = self.run.experiment
        self.endpoint = endpoint
        self.models = models or Models()
        self._number = number
        self._progress = Path(progress) if progress else None
        self._population: tuple[int, Population] | None = None
        self._timeline: Timeline | None = None
        self._adapters: tuple[int, int, AdapterStore] | None = None
        self._answers: ByteStore | None = None
        self._told = False

    def tell_written(self, shard: Shard) -> None:
        """Stages, once, how the prompts of the run's model are written (`sim.prompts.chat_template.facts`)."""
        if not self._told:
            name, facts = self.experiment.model.base, json.dumps(self.base.written)
            self.run.write_part("written", shard.seed, shard.round, "base", [{"model": name, "facts": facts}])
            self._told = True

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

    def devices(self, shard: Shard) -> list[Device]:
        """The shard's devices, in order."""
        population = self.population(shard.seed)
        return [Device(index, population.user(index)) for index in shard.devices]

    def adapters(self, shard: Shard, settled: int) -> AdapterStore:
        """The adapters of the shard's seed. With a new round, what the one named `settled` has superseded goes."""
        from untether.clients.stores.adapter_store import AdapterStore

        if self._adapters is None or self._adapters[:2] != (shard.seed, shard.round):
            store = AdapterStore(self.run.path, shard.seed)
            store.prune(settled)
            self._adapters = (shard.seed, shard.round, store)
        return self._adapters[2]

    def reread(self) -> None:
        """Forgets what it knows of files: others may lie in the run directory now."""
        self._adapters = None

    def progress(self, done: float) -> None:
        """Tells the coordinator how many devices of this shard are done (a small file that it looks at)."""
        if self._progress:
            with contextlib.suppress(OSError):
                self._progress.write_text(f"{done:.1f}")
