"""A round on its way: as planned (`Agenda`), as delivered (`Delivered`), as it came out (`Day`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from untether.sim.rounds.messages import RequestOf
from untether.sim.rounds.sharing import Cohort
from untether.sim.time.asking import Size
from untether.sim.time.timeline import Delivery, Plan, Schedule

AUGMENT = "augment"
"""The lane of the requests for samples, which the arms share. The cloud arm's questions have its own name, `CLOUD`."""


@dataclass(frozen=True, slots=True)
class Agenda:
    """A round as planned. `due`: the devices that ask for samples and train on them; `alone`: those that train on their
    own data, for which they need nobody; `asking`: those that the fetch pass is about.
    """

    plan: Plan
    due: tuple[int, ...]
    alone: tuple[int, ...]

    @property
    def asking(self) -> list[int]:
        return sorted({*self.due, *self.alone, *(ask.device for ask in self.plan.asks)})


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of a round's requests. `sizes`: the real ones; `lost`: (device, request) of answers that were written
    and never reached their device, of each lane.
    """

    agenda: Agenda
    delivery: Delivery
    sizes: Mapping[str, Size]
    lost: Mapping[str, tuple[RequestOf, ...]]

    @property
    def short(self) -> list[int]:
        """The devices that lost answers with samples: what the others hold is to be filtered without those."""
        return sorted({device for device, _ in self.lost[AUGMENT]})


@dataclass(frozen=True, slots=True)
class Day:
    """A round as it came out. `served`: cloud tokens that a due device spent, and whether it has what it asked for.

    `came`: of the devices whose samples came, how many (see `Material.plus`). `trained`: those with data of their own.
    `cohort`: who trained together.
    """

    delivered: Delivered
    schedule: Schedule
    served: Mapping[int, tuple[int, bool]]
    came: Mapping[int, tuple[int, ...]]
    trained: frozenset[int]
    cohort: Cohort = Cohort()

    @property
    def agenda(self) -> Agenda:
        return self.delivered.agenda

    def after(self, outcomes: Mapping[int, str]) -> Day:
        """Returns the day with what became of the devices that trained together."""
        return replace(self, cohort=self.cohort.without(outcomes))
