"""What a shard's devices may learn from in a round: their own items, the samples that reached them, and, for the
placebo, those of others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from untether.clients.device.arms import Material
from untether.clients.device.device import Device, Shard
from untether.clients.device.fetch import LEAK, NOT_RECEIVED
from untether.clients.device.worker import Worker
from untether.sim.core.records import Sample
from untether.sim.population.leaks import LeakChecker
from untether.sim.population.source import device_id
from untether.sim.rounds.orders import rows as table_rows
from untether.sim.time.timeline_state import REAL

DONORS = 2
"""How many other devices a placebo may be drawn from: the next ones that were due in the same round. The second only
gives what the first has too little of."""


class Materials:
    """Reads the samples of a shard once; `of` says what a device trains an adapter `on`.

    The order's table `samples` names the rounds whose samples each device uses; `due` are the devices that asked in
    this round. What never reached a device is not among its samples.
    """

    def __init__(self, worker: Worker, shard: Shard, order: Mapping[str, Any]):
        self.experiment, self.shard = worker.experiment, shard
        self._rounds = {
            (device, on): range(first, last + 1)
            for device, first, last, on in table_rows(order, "samples", "device", "first", "last", "on")
        }
        self._donors = self._draw(shard, order["due"]) if "placebo" in self.experiment.arms else {}
        wanted = {*shard.devices, *(donor for donors in self._donors.values() for donor in donors)}
        names = [device_id(index) for index in sorted(wanted)]
        self._samples: dict[tuple[str, int], list[tuple[Sample, str]]] = defaultdict(list)
        for row in worker.run.read_rows(order["sample_parts"], names) if self._rounds else ():
            if row["verdict"] not in (NOT_RECEIVED, LEAK):
                sample = Sample(*(row[name] for name in Sample.__dataclass_fields__))
                self._samples[row["device_id"], row["round"]].append((sample, row["verdict"]))

    def of(self, device: Device, on: str) -> Material:
        """A device's own data and, unless it trains on that alone, the samples that it goes with."""
        real = device.real_items(self.experiment, self.shard.round)
        if on == REAL:
            return Material(real)
        name = device.device_id
        rounds = [round for round in self._rounds.get((device.index, on), ()) if (name, round) in self._samples]
        accepted = self._accepted(name, rounds)
        foreign, of_second = self._foreign(device, rounds, accepted)
        return Material(
            real=real,
            accepted=tuple(accepted),
            unfiltered=tuple(sample for round in rounds for sample, _ in self._samples[name, round]),
            foreign=tuple(foreign),
            of_second=of_second,
        )

    def _accepted(self, name: str, rounds: Sequence[int]) -> list[Sample]:
        found = (self._samples.get((name, round), ()) for round in rounds)
        return [sample for samples in found for sample, verdict in samples if verdict == "accepted"]

    def _foreign(self, device: Device, rounds: Sequence[int], like: Sequence[Sample]) -> tuple[list[Sample], int]:
        """What the placebo is drawn from: all that another user has, and of a task that this one has too little of as
        much of the next one's as is missing; and how many these are.
        """
        missing, found, of_second = Counter(sample.task for sample in like), [], 0
        for donor in self._donors.get(device.index, ()):
            theirs = self._harmless(device, self._accepted(device_id(donor), rounds))
            most = missing if found else {}
            given = [sample for task in missing for sample in _first(theirs, task, most.get(task))]
            missing = Counter({t: n for t in missing if (n := missing[t] - sum(s.task == t for s in given)) > 0})
            of_second += len(given) if found else 0
            found += given
            if not missing:
                break
        return found, of_second

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


def _first(samples: Sequence[Sample], task: str, most: int | None) -> list[Sample]:
    return [sample for sample in samples if sample.task == task][:most]
