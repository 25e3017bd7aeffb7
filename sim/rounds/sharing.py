"""A round of training together, in virtual time: who is asked, who gets what is shared, who uploads in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from untether.sim.core.kinds import SELECTIONS
from untether.sim.core.seeding import derive
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import FEDERATED
from untether.sim.rounds.selection import Candidates
from untether.sim.time.network.transfers import Carried
from untether.sim.time.timeline import Plan, Schedule, Timeline
from untether.sim.time.timeline_state import VirtualWork

ALL = "all"
"""The group of all devices."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who trains together in a round.

    Args:
        selected: The devices that were asked.
        took_part: Those whose upload arrived before the round ended; the others are stragglers.
        carried: Every try to send something, down or up.
    """

    selected: tuple[int, ...] = ()
    took_part: tuple[int, ...] = ()
    carried: tuple[Carried, ...] = field(default=(), repr=False)

    def without(self, outcomes: Mapping[int, str]) -> Cohort:
        """Less the devices whose outcome is not `ok`: they were lost when they trained."""
        return replace(self, took_part=tuple(d for d in self.took_part if outcomes.get(d, "ok") == "ok"))


def group_of(experiment: Experiment, tasks: Sequence[str]) -> str:
    """Returns the group that a device with these tasks shares with."""
    return "+".join(sorted(tasks)) if experiment.strategy.by_task else ALL


def rank_of(experiment: Experiment, seed: int, device_id: str) -> int:
    """Returns the rank of the adapter that a device trains together with others."""
    ranks = experiment.strategy.ranks or experiment.ranks
    return ranks[derive(seed, device_id, "rank") % len(ranks)]


def private_name(rank: int) -> str:
    """Returns the name under which devices of this rank keep what stays with them."""
    return f"{FEDERATED}.{rank}"


def selected(
    experiment: Experiment, timeline: Timeline, plan: Plan, works: Mapping[int, VirtualWork], last: Mapping[int, int],
    items: Callable[[int], int],
) -> tuple[int, ...]:  # fmt: skip
    """Returns the devices that are asked to train, of those that have `works`."""
    candidates = Candidates(
        timeline.seed, plan.round, tuple(sorted(works)), lambda device: last.get(device, -1), items,
        lambda device: works[device].tokens,
        lambda device: timeline.link(device).next_up(plan.start_s, plan.end_s) is not None,
    )  # fmt: skip
    chosen = SELECTIONS.bind(experiment.strategy.select, experiment.settings)(candidates, experiment.strategy)
    return tuple(sorted(chosen))


class Exchange:
    """The way of what is shared to the devices of a round and back. `up`, `down`: what travels, in adapters of
    `lora.rank`; 0.5 is one side of square layers.
    """

    def __init__(self, experiment: Experiment, timeline: Timeline, plan: Plan, up: float, down: float):
        self.experiment, self.timeline, self.plan, self._up, self._down = experiment, timeline, plan, up, down
        self._carried: list[Carried] = []

    def _size(self, device: int, adapters: float) -> float:
        """Bytes of the nominal model's adapter."""
        cost = self.timeline.cost(device, FEDERATED)
        mine = rank_of(self.experiment, self.timeline.seed, self.timeline.device_id(device))
        return adapters * cost.adapter_bytes() * mine / self.experiment.for_arm(FEDERATED)[0].rank

    def down(self, works: Mapping[int, VirtualWork], devices: Sequence[int]) -> Iterator[VirtualWork]:
        """Yields the works of those that get what is shared, from when they have it."""
        for device in devices:
            if not self._down:
                yield works[device]
                continue
            size = self._size(device, self._down)
            tries, done_s = self.timeline.carry(device, self.plan.start_s, self.plan.end_s, size, "down")
            self._carried += tries
            if done_s is not None:
                yield replace(works[device], from_s=done_s)

    def up(self, devices: Sequence[int], schedule: Schedule) -> Cohort:
        """Tells who uploaded in time what it trained."""
        arrived = []
        for version in schedule.versions:
            if version.arm != FEDERATED or version.outcome != "ok" or version.live_s >= self.plan.end_s:
                continue
            size = self._size(version.device, self._up)
            tries, done_s = self.timeline.carry(version.device, version.live_s, self.plan.end_s, size, "up")
            self._carried += tries
            if done_s is not None:
                arrived.append(version.device)
        return Cohort(tuple(devices), tuple(sorted(arrived)), tuple(self._carried))


def transfer_rows(timeline: Timeline, plan: Plan, cohort: Cohort) -> list[dict[str, Any]]:
    """Returns the rows of `events`: one a try, of kind `download` or `upload`; and one, `late`, a straggler: a device
    that was asked and whose part did not arrive in the round.
    """
    rows = []
    for one in cohort.carried:
        device, way = timeline.device_id(one.device), f"{one.way}load"
        rows.append({
            "time_s": one.start_s, "event_id": f"{way}-s{timeline.seed}-r{plan.round}-{device}#{one.number}",
            "attempt": one.number, "device_id": device, "arm": FEDERATED, "kind": way, "outcome": one.outcome,
            "duration_s": one.end_s - one.start_s, "bytes_up": round(one.bytes) if one.way == "up" else 0,
            "bytes_down": round(one.bytes) if one.way == "down" else 0,
            "energy_j": timeline.profile(one.device).radio_w * (one.end_s - one.start_s),
        })  # fmt: skip
    for late in sorted(set(cohort.selected) - set(cohort.took_part)):
        device = timeline.device_id(late)
        rows.append({
            "time_s": timeline.round_end_s(plan.round), "attempt": 0, "device_id": device,
            "event_id": f"straggler-s{timeline.seed}-r{plan.round}-{device}", "arm": FEDERATED, "kind": "straggler",
            "outcome": "late",
        })  # fmt: skip
    return rows


def ledger_rows_of(timeline: Timeline, cohort: Cohort, what: str) -> list[dict[str, Any]]:
    """Returns the rows of `ledger`: what was made of the histories of devices left them, though no text."""
    return [
        {
            "time_s": one.start_s, "device_id": timeline.device_id(one.device), "attempt": one.number,
            "kind": "adapter", "item_id": what, "chars": 0, "tokens": 0, "masked": 0,
        }
        for one in cohort.carried if one.way == "up" and one.bytes > 0
    ]  # fmt: skip
