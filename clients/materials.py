"""What a shard's devices may learn from in a round: their own items, the samples that reached them, and, for the
placebo, those of others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from clients.arms import Material
from clients.device import Device, Shard
from clients.worker import Worker
from sim.leaks import LeakChecker
from sim.orders import rows as table_rows
from sim.population.source import device_id
from sim.records import Sample
from sim.timeline_state import REAL

DONORS = 3
"""How many other devices a placebo is drawn from: the next ones that were due in the same round."""


class Materials:
    """Reads the samples of a shard once; `of` says what a device trains an adapter `on`.

    The order's table `samples` names the rounds whose samples each device uses, `lost` the requests whose answers never
    reached it; `due` are the devices that asked in this round.
    """

    def __init__(self, worker: Worker, shard: Shard, order: Mapping[str, Any]):
        self.experiment, self.shard = worker.experiment, shard
        self._rounds: dict[tuple[int, str], set[int]] = defaultdict(set)
        for device, round, on in table_rows(order, "samples", "device", "round", "on"):
            self._rounds[device, on].add(round)
        self._donors = self._draw(shard, order["due"]) if "placebo" in self.experiment.arms else {}
        wanted = {*shard.devices, *(donor for donors in self._donors.values() for donor in donors)}
        names = [device_id(index) for index in sorted(wanted)]
        lost = {name for (name,) in table_rows(order, "lost", "request")}
        self._samples: dict[tuple[str, int], list[tuple[Sample, str]]] = defaultdict(list)
        for row in worker.run.read_rows(order["sample_parts"], names) if self._rounds else ():
            if row["request_id"] not in lost and row["verdict"] != "rejected_by:leak":
                sample = Sample(*(row[name] for name in Sample.__dataclass_fields__))
                self._samples[row["device_id"], row["round"]].append((sample, row["verdict"]))

    def of(self, device: Device, on: str) -> Material:
        """A device's own data and, unless it trains on that alone, the samples that it goes with."""
        real = device.real_items(self.experiment, self.shard.round)
        if on == REAL:
            return Material(real)
        rounds = sorted(self._rounds[device.index, on])
        donated = [s for donor in self._donors.get(device.index, ()) for s in self._accepted(device_id(donor), rounds)]
        return Material(
            real=real,
            accepted=tuple(self._accepted(device.device_id, rounds)),
            unfiltered=tuple(sample for round in rounds for sample, _ in self._samples[device.device_id, round]),
            foreign=tuple(self._harmless(device, donated)),
        )

    def _accepted(self, name: str, rounds: Sequence[int]) -> list[Sample]:
        found = (self._samples.get((name, round), ()) for round in rounds)
        return [sample for samples in found for sample, verdict in samples if verdict == "accepted"]

    def _harmless(self, device: Device, samples: Sequence[Sample]) -> list[Sample]:
        """Foreign samples without leaks of this device's own queries (they were checked against their owner's)."""
        checker = LeakChecker(device.held_out(self.shard.round)) if samples else None
        return [s for s in samples if checker and not checker.is_leak(s.task, s.input, s.output)]

    @staticmethod
    def _draw(shard: Shard, due: Sequence[int]) -> dict[int, list[int]]:
        circle = sorted(due)
        drawn = {}
        for device in shard.devices:
            place = bisect_right(circle, device)
            after = [circle[(place + k) % len(circle)] for k in range(min(DONORS, len(circle)))]
            drawn[device] = [donor for donor in dict.fromkeys(after) if donor != device]
        return drawn
