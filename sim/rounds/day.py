"""A round on its way: as planned (`Agenda`), as delivered (`Delivered`), as it came out (`Day`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from untether.sim.rounds.messages import RequestOf
from untether.sim.rounds.sharing import Cohort
from untether.sim.time.asking import Size
from untether.sim.time.timeline import Delivery, Plan, Schedule

AUGMENT = "augment"
"""The lane of the requests for samples, which the arms share. The cloud arm's questions have its own name, `CLOUD`."""

KINDS = ("augment", "answer")
"""Of the events that are requests."""


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


def sizes_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Size]:
    """Returns the real size of each request, from the fetch pass's rows: bytes and tokens of all its attempts together
    (a malformed answer is paid for and drawn again), and its outcome.
    """
    sizes: dict[str, Size] = {}
    for row in sorted((row for row in answers if row["kind"] in KINDS), key=lambda row: row["attempt"]):
        before = sizes.get(row["request_id"], Size(0, 0, 0, 0, bodies=0))
        sizes[row["request_id"]] = Size(
            before.bytes_up + (row["bytes_up"] or 0), before.bytes_down + (row["bytes_down"] or 0),
            before.tokens_in + (row["tokens_in"] or 0), before.tokens_out + (row["tokens_out"] or 0), row["outcome"],
            before.bodies + bool(row["bytes_up"]),
        )
    return sizes
