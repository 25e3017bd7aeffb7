"""Devices that really learn, and those that live in virtual time alone (`engine.learners`).

A device that does not learn is planned, asks, waits in the cloud's queue, pays and trains in virtual time as every
other does. What only a real answer tells, how long it is and how many of its samples pass the filters, is for each such
device that of one learner, drawn from (seed, device, round). So a fleet costs the real work of its learners, however
large it is.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from itertools import groupby
from operator import attrgetter
from typing import Any, Protocol, TypeVar

from untether.sim.core.seeding import derive
from untether.sim.experiment import Experiment
from untether.sim.population.source import device_id
from untether.sim.rounds.material import SAMPLE_COUNTS, Material
from untether.sim.time.asking import Ask, Size


class _OfDevice(Protocol):
    @property
    def device(self) -> int: ...


Row = TypeVar("Row", bound=_OfDevice)


class Learners(Collection[int]):
    """The devices of one seed that learn, and what the others are taken to get.

    Args:
        experiment: The experiment.
        seed: The seed, from which they are drawn.
        devices: How many devices there are.
        state: What an earlier one's `state()` returned.
    """

    def __init__(self, experiment: Experiment, seed: int, devices: int, state: Mapping[str, Any] | None = None):
        count = experiment.engine.learning(devices)
        self.seed, self.everybody = seed, count == devices
        self.devices: Sequence[int] = range(devices)
        if not self.everybody:
            self.devices = sorted(random.Random(derive(seed, "learners")).sample(range(devices), count))
        self._learns: Collection[int] = self.devices if self.everybody else frozenset(self.devices)
        self._had = {int(device): (got, Material(*counts)) for device, (got, *counts) in (state or {}).items()}

    def __contains__(self, device: int) -> bool:
        return device in self._learns

    def __iter__(self) -> Iterator[int]:
        return iter(self.devices)

    def __len__(self) -> int:
        return len(self.devices)

    def among(self, devices: Iterable[int]) -> tuple[int, ...]:
        """Returns those of the devices that learn."""
        return tuple(device for device in devices if device in self._learns)

    def rows(self, rows: Iterable[Row]) -> tuple[Row, ...]:
        """Returns the rows that are about a device that learns."""
        return tuple(row for row in rows if row.device in self._learns)

    def sizes(
        self, round: int, asks: Sequence[Ask], granted: Collection[str], real: Mapping[str, Size]
    ) -> dict[str, Size]:
        """Returns the sizes of the granted requests, from the `real` ones of the devices that learn.

        A device's requests of a lane get, in their order and again from the first, the sizes that its learner's got.
        Where no learner was answered in that lane, a request has its expected size. `asks` come device by device.
        """
        if self.everybody:
            return dict(real)
        found, pools = dict(real), defaultdict[str, dict[int, list[Size]]](dict)
        for ask in asks:
            if ask.request_id in real:
                pools[ask.lane].setdefault(ask.device, []).append(real[ask.request_id])
        listed = {lane: list(pool.values()) for lane, pool in pools.items()}
        for device, own in groupby(asks, key=attrgetter("device")):
            if device in self._learns:
                continue
            made = Counter[str]()
            for ask in own:
                if ask.request_id in granted:
                    of_learner = self._pick(device, round, listed.get(ask.lane, ()))
                    found[ask.request_id] = of_learner[made[ask.lane] % len(of_learner)] if of_learner else ask.size
                    made[ask.lane] += 1
        return found

    def materials(
        self, round: int, devices: Iterable[int], got: Callable[[int], int], real: Mapping[int, Material]
    ) -> dict[int, Material]:
        """Returns what each device could train on, from what those that learn can, now or when they last could.

        Args:
            round: The round.
            devices: Those that train or ask.
            got: How many of a device's requests for samples were answered.
            real: Of the devices that learn.
        """
        if self.everybody:
            return dict(real)
        self._had |= {device: (got(device), material) for device, material in real.items()}
        pools = defaultdict[int, list[tuple[int, Material]]](list)
        for device in sorted(self._had):
            pools[self._had[device][0]].append(self._had[device])
        anyone = [had for count in sorted(pools) for had in pools[count]]
        found = dict(real)
        for device in devices:
            if device not in self._learns and anyone:
                mine = got(device)
                answers, material = self._pick(device, round, pools.get(mine) or anyone)
                found[device] = material if answers == mine else _share(material, mine / max(1, answers))
        return found

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs (JSON)."""
        return {str(device): [got, *astuple(material)] for device, (got, material) in self._had.items()}

    def _pick(self, device: int, round: int, pool: Sequence[Any]) -> Any:
        return pool[derive(self.seed, device_id(device), round, "like") % len(pool)] if pool else None


def _share(material: Material, share: float) -> Material:
    """With a share of its samples: as many as came of the requests that were answered."""
    return replace(material, **{name: round(min(1.0, share) * getattr(material, name)) for name in SAMPLE_COUNTS})
