"""A worker: the process that holds what is heavy (base model, encoder) and runs shards of devices through it.

Everything a worker holds can be rebuilt from the run directory, so a worker may die at any moment: its shard is run
again elsewhere and writes the same parts.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.device import Device, Shard
from sim.population.source import Population, open_population
from sim.results import RunDirectory

if TYPE_CHECKING:
    from clients.adapter_store import AdapterStore
    from clients.base import FrozenBase
    from clients.embedding import Encoder


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the cloud is: the configured endpoint, or the gateway that the run itself serves."""

    base_url: str
    model: str
    fingerprint: str = ""


class Worker:
    """Runs shards. Heavy things load on first use and stay resident: one base model and one encoder a process."""

    def __init__(self, run_directory: str, endpoint: Endpoint, threads: int = 0, progress: str = ""):
        # oneDNN keeps the code of the last 1024 shapes of products, some 0.3 GiB; a cohort's shapes hardly come back.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.run = RunDirectory.open(run_directory)
        self.experiment = self.run.experiment
        self.endpoint = endpoint
        self._progress = Path(progress) if progress else None
        self._population: tuple[int, Population] | None = None
        self._adapters: tuple[int, int, AdapterStore] | None = None

    def pid(self) -> int:
        """The process this worker lives in."""
        return os.getpid()

    def fetch(self, shard: Shard) -> dict[str, Any]:
        """Asks the cloud for this shard's devices and filters what comes back (see `clients.fetch`)."""
        from clients.fetch import fetch

        return fetch(self, shard)

    def learn(self, shard: Shard, samples: Sequence[str]) -> dict[str, Any]:
        """Trains, answers and scores this shard's devices; `samples` are the round's parts of that table."""
        from clients.learn import learn

        return learn(self, shard, samples)

    def share(self, seed: int) -> dict[str, Any]:
        """Trains the `shared` arm's adapters, once for all workers."""
        from clients.shared import train_shared

        return train_shared(self, seed)

    @functools.cached_property
    def base(self) -> FrozenBase:
        """The frozen on-device model."""
        from clients.base import FrozenBase
        from clients.base_model import resolve

        model, engine = self.experiment.model, self.experiment.engine
        return FrozenBase.load(resolve(model.base), dtype=model.dtype, device=engine.device)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The sentence encoder of the filters."""
        from clients.embedding import Encoder

        return Encoder(self.experiment.filters.encoder, device=self.experiment.engine.device)

    def population(self, seed: int) -> Population:
        """The users of a seed; one seed is held at a time."""
        if self._population is None or self._population[0] != seed:
            self._population = (seed, open_population(self.experiment, seed))
        return self._population[1]

    def devices(self, shard: Shard) -> list[Device]:
        """The shard's devices, in order."""
        population = self.population(shard.seed)
        return [Device(index, population.user(index)) for index in shard.devices]

    def adapters(self, shard: Shard) -> AdapterStore:
        """The adapters of the shard's seed. With a new round, what the committed ones superseded goes."""
        from clients.adapter_store import AdapterStore

        if self._adapters is None or self._adapters[:2] != (shard.seed, shard.round):
            store = AdapterStore(self.run.path, shard.seed)
            store.prune(shard.round - 1)
            self._adapters = (shard.seed, shard.round, store)
        return self._adapters[2]

    def progress(self, done: float) -> None:
        """Tells the coordinator how many devices of this shard are done (a small file that it looks at)."""
        if self._progress:
            with contextlib.suppress(OSError):
                self._progress.write_text(f"{done:.1f}")
