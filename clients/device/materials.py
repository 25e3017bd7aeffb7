"""Training data of a shard's devices in a round: their own items, the samples that reached them and, for the placebo,
samples of other users.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence

from untether.clients.device.arms import TrainingData
from untether.clients.device.device import Device
from untether.clients.device.worker import Inputs, rows_of
from untether.sim.core.records import LEAK, NOT_RECEIVED, Interaction, Sample
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import records
from untether.sim.population.leaks import LeakChecker
from untether.sim.population.order import known_history
from untether.sim.population.source import device_id
from untether.sim.rounds.messages import Learn
from untether.sim.time.timeline_state import REAL

DONORS = 2
"""How many other devices a placebo may be drawn from: the next ones that asked in the same round. The second only gives
what the first has too little of."""


def needs_others(experiment: Experiment) -> bool:
    """Returns whether an arm trains on samples of other users."""
    return any(arm.draws == "foreign" for arm in records(experiment.arms))


def donors(order: Learn) -> dict[int, list[int]]:
    """Returns the devices from whose samples each device's placebo is drawn, by device, in order of preference."""
    circle, drawn = sorted(order.due), {}
    for device in order.devices:
        place = bisect_right(circle, device)
        after = [circle[(place + k) % len(circle)] for k in range(min(DONORS, len(circle)))]
        drawn[device] = [donor for donor in dict.fromkeys(after) if donor != device]
    return drawn


class Materials:
    """Reads the samples of an order's devices once. Samples that never reached their device are left out."""

    def __init__(self, experiment: Experiment, order: Learn, inputs: Inputs):
        self.experiment, self.round = experiment, order.round
        self._rounds = {(row.device, row.on): range(row.first, row.last + 1) for row in order.trains}
        self._donors = donors(order) if needs_others(experiment) else {}
        self._samples: dict[tuple[str, int], list[tuple[Sample, str]]] = defaultdict(list)
        for row in rows_of(inputs.samples) if self._rounds else ():
            if row["verdict"] not in (NOT_RECEIVED, LEAK):
                sample = Sample(*(row[name] for name in Sample.__dataclass_fields__))
                self._samples[row["device_id"], row["round"]].append((sample, row["verdict"]))

    def of(self, device: Device, on: str) -> TrainingData:
        """Returns what a device can train on.

        Args:
            device: The device.
            on: What the version of the adapter is trained on (see `sim.time.timeline_state`).
        """
        real = device.real_items(self.experiment, self.round)
        if on == REAL:
            return TrainingData(real)
        name = device.device_id
        rounds = [round for round in self._rounds.get((device.index, on), ()) if (name, round) in self._samples]
        accepted = self._accepted(name, rounds)
        foreign, of_second = self._foreign(device, rounds, accepted)
        return TrainingData(
            real=real,
            accepted=tuple(accepted),
            unfiltered=tuple(sample for round in rounds for sample, _ in self._samples[name, round]),
            foreign=tuple(foreign),
            withheld=self._withheld(device, real) if accepted else (),
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

    def _withheld(self, device: Device, real: Sequence[Interaction]) -> tuple[Interaction, ...]:
        """What the device would have without population.max_history, but for leaks of its own queries."""
        if not any(arm.draws == "withheld" for arm in records(self.experiment.arms)):
            return ()
        has, checker = {(i.task, i.item_id) for i in real}, LeakChecker(device.held_out(self.round))
        known = (i for task in device.user.tasks for i in known_history(device.user, task, self.round))
        older = (i for i in known if (i.task, i.item_id) not in has)
        return tuple(i for i in older if not checker.is_leak(i.task, i.input, i.output))

    def _harmless(self, device: Device, samples: Sequence[Sample]) -> list[Sample]:
        """Foreign samples without leaks of this device's own queries (they were checked against their owner's)."""
        checker = LeakChecker(device.held_out(self.round)) if samples else None
        return [s for s in samples if checker and not checker.is_leak(s.task, s.input, s.output)]


def _first(samples: Sequence[Sample], task: str, most: int | None) -> list[Sample]:
    return [sample for sample in samples if sample.task == task][:most]
