"""Between the round loop and the timeline: which requests a round wants, what its adapters are trained on, and what the
hosts must be told. Names no text: a device's data is here only as counts and lengths.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.asking import Ask, Size
from sim.experiment import Experiment
from sim.population.source import Population, device_id
from sim.sections import Training
from sim.timeline import Plan, Schedule, Timeline
from sim.timeline_state import STALE, Work

LEARNS_FROM = {
    "local": "real", "local_matched": "real", "synthetic_only": "accepted", "unfiltered": "real received",
    "unfiltered_matched": "real accepted", "placebo": "real accepted", "collaborative": "real accepted",
}  # fmt: skip
"""What each trained arm's examples are counted from. `local_matched` takes its steps from `collaborative`."""

AUGMENT, CLOUD = "augment", "cloud"
"""Lanes: the requests for samples that the arms share, and the cloud arm's questions."""

KINDS = ("augment", "answer")
"""Of the events that are requests."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a device could train on in a round, counted: items and their tokens (about four characters each)."""

    real: int
    real_tokens: int
    accepted: int = 0
    accepted_tokens: int = 0
    received: int = 0
    received_tokens: int = 0
    longest: int = 128


def request_names(experiment: Experiment, seed: int, round: int, device: int, tasks: Sequence[str]) -> list[str]:
    """The names of one device's requests for samples in a round, in the order in which it makes them."""
    parts = math.ceil(experiment.cloud.samples / experiment.cloud.samples_per_request)
    names = [f"s{seed}-r{round}-{device_id(device)}-{task}" for task in tasks]
    return [name if part == 0 else f"{name}+{part}" for name in names for part in range(parts)]


def question_names(seed: int, round: int, device: int, tasks_of_queries: Sequence[str]) -> list[str]:
    """The names of the cloud arm's requests: one a query."""
    name = f"s{seed}-r{round}-{device_id(device)}"
    return [f"{name}-{task}-q{number}" for number, task in enumerate(tasks_of_queries)]


def optimizer_steps(training: Training, examples: int) -> int:
    """Optimizer steps on so many examples, as the engine counts them."""
    if not examples:
        return 0
    return training.steps or max(1, math.ceil(training.epochs * math.ceil(examples / training.batch_size)))


class Rounds:
    """The virtual time of one seed, as the round loop uses it.

    1. `plan(round, devices)`; 2. ask for all but `ungranted(plan)`; 3. `schedule(plan, sizes, materials)`;
    4. learn as `learning(schedule)` says; write `event_rows`; 5. `advance(schedule)`, and commit `state()` with it.
    """

    def __init__(
        self, experiment: Experiment, seed: int, population: Population, state: Mapping[str, Any] | None = None
    ):
        self.experiment, self.seed, self.population = experiment, seed, population
        self.timeline = Timeline(experiment, seed, device_id, state)
        arms = {*experiment.arms, *(["collaborative"] if "rag_adapter" in experiment.arms else [])}
        self._known: dict[int, tuple[tuple[str, ...], tuple[tuple[str, int | None], ...]]] = {}
        self.arms = [arm for arm in LEARNS_FROM if arm in arms]
        self.asks_samples = bool(experiment.cloud.samples) and any(arm != "local" for arm in self.arms)

    def plan(self, round: int, devices: Sequence[int]) -> Plan:
        """Which of the requests that these devices want to make get through."""
        return self.timeline.plan(round, [ask for device in devices for ask in self._asks(round, device)])

    def ungranted(self, plan: Plan) -> list[str]:
        """The requests that are not to be made, for the fetch pass."""
        granted = plan.granted
        return [ask.request_id for ask in plan.asks if ask.request_id not in granted]

    def schedule(self, plan: Plan, sizes: Mapping[str, Size], materials: Mapping[int, Material]) -> Schedule:
        """When everything ends. `sizes` of the requests that were made; `materials` of the devices that learn."""
        wanted: dict[int, list[str]] = {device: [] for device in materials}
        for ask in plan.asks:
            if ask.lane == AUGMENT and ask.device in wanted:
                wanted[ask.device].append(ask.request_id)
        works = [
            self._work(device, arm, material, wanted[device])
            for device, material in materials.items()
            for arm in self.arms
        ]
        return self.timeline.schedule(plan, sizes, works)

    def learning(self, schedule: Schedule) -> dict[str, list[str]]:
        """For the learn pass, what is not as in a run without virtual time (so empty lists by default).

        `lost`: requests whose samples never reached their device. Adapters, as `device/arm`: `untrained` in this round
        (their last one, or the frozen base, answers); `stale`, trained on the samples that came before; `twice`,
        trained on what there was first, and later again with this round's samples, from where the round began.
        """
        granted, versions = schedule.plan.granted, [v for v in schedule.versions if v.outcome == "ok"]
        last = {(version.device, version.arm): version for version in versions}
        owners = dict.fromkeys((version.device, version.arm) for version in schedule.versions)
        waiting = dict.fromkeys((ask.device, arm) for ask in schedule.plan.asks for arm in self.arms)
        count = Counter((version.device, version.arm) for version in versions)
        return {
            "lost": [name for name, final in schedule.finals.items() if name in granted and not final.answered],
            "untrained": [_name(*key) for key in {**owners, **waiting} if key not in last],
            "stale": [_name(*key) for key, version in last.items() if version.on == STALE],
            "twice": [_name(*key) for key, number in count.items() if number > 1],
        }

    def event_rows(
        self, schedule: Schedule, answers: Sequence[Mapping[str, Any]], learned: Sequence[Mapping[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """The round's rows of `events`: those of the timeline, with what the passes know of real answers and real
        training (`answers`, `learned`: their own rows), and all else that the passes noted.
        """
        details = {row["request_id"]: row["detail"] for row in answers if row["kind"] in KINDS}
        training = {(row["device_id"], row["arm"]): row for row in learned if row["kind"] == "train"}
        rows = [dict(row) for row in (*answers, *learned) if row["kind"] not in (*KINDS, "train")]
        for row in self.timeline.event_rows(schedule):
            if row["kind"] == "train":
                real = training.get((row["device_id"], row["arm"]))
                if real is not None and row["outcome"] == "ok":
                    row |= {"tokens_in": real["tokens_in"], "outcome": real["outcome"]}
                    row["detail"] = f"{row['detail']}, {real['detail']}"
            elif row["attempt"] == schedule.finals[row["request_id"]].attempts - 1:
                row["detail"] = " ".join(filter(None, [row["detail"], details.get(row["request_id"])]))
            rows.append(row)
        return rows

    def advance(self, schedule: Schedule) -> None:
        """Makes a schedule the past."""
        self.timeline.advance(schedule)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs (JSON)."""
        return self.timeline.state()

    def _asks(self, round: int, device: int) -> Iterator[Ask]:
        tasks, of_queries = self._tasks(round, device)
        if self.asks_samples:
            expected = self.timeline.expected(AUGMENT)
            for name in request_names(self.experiment, self.seed, round, device, tasks):
                yield Ask(name, device, expected, AUGMENT)
        if "cloud" in self.experiment.arms:
            expected = self.timeline.expected(CLOUD)
            by_day = self.experiment.hardware.queries == "day"
            names = question_names(self.seed, round, device, of_queries)
            times = [self.timeline.query_time_s(round, device, number) for number in range(len(names))]
            order = sorted(range(len(names)), key=times.__getitem__) if by_day else range(len(names))
            for number in order:
                yield Ask(names[number], device, expected, CLOUD, times[number] if by_day else None)

    def _tasks(self, round: int, device: int) -> tuple[tuple[str, ...], list[str]]:
        """The tasks that a device asks samples for, and the task of each of its queries of a round."""
        if device not in self._known:
            user = self.population.user(device)
            self._known[device] = user.tasks, tuple((query.task, query.round) for query in user.queries)
        tasks, queries = self._known[device]
        return tasks, [task for task, when in queries if when in (None, round)]

    def _work(self, device: int, arm: str, material: Material, requests: Sequence[str]) -> Work:
        _, training = self.experiment.for_arm(arm)
        counted = LEARNS_FROM[arm].split()
        items, tokens = _total(material, counted)
        steps = optimizer_steps(training, items)
        if arm == "local_matched" and not training.steps:
            _, like = self.experiment.for_arm("collaborative")
            steps = optimizer_steps(like, material.real + material.accepted)
        fallback_items, fallback_tokens = _total(material, [what for what in counted if what == "real"])
        return Work(
            device, arm, steps, _trained_tokens(training, steps, items, tokens),
            () if arm == "local" else tuple(requests), *_fallback(training, fallback_items, fallback_tokens),
            row_tokens=material.longest,
        )


def _total(material: Material, counted: Sequence[str]) -> tuple[int, int]:
    return (
        sum(getattr(material, what) for what in counted), sum(getattr(material, f"{what}_tokens") for what in counted)
    )


def _trained_tokens(training: Training, steps: int, items: int, tokens: int) -> int:
    """Tokens of so many steps, when a pass over the items takes ceil(items / batch) of them."""
    return round(steps * tokens / math.ceil(items / training.batch_size)) if items else 0


def _fallback(training: Training, items: int, tokens: int) -> tuple[int, int]:
    steps = optimizer_steps(training, items)
    return steps, _trained_tokens(training, steps, items, tokens)


def _name(device: int, arm: str) -> str:
    return f"{device}/{arm}"


def sizes_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Size]:
    """The real size of each request, from the fetch pass's rows: bytes and tokens of all its attempts together (a
    malformed answer is paid for and drawn again), and its outcome.
    """
    sizes: dict[str, Size] = {}
    for row in sorted((row for row in answers if row["kind"] in KINDS), key=lambda row: row["attempt"]):
        before = sizes.get(row["request_id"], Size(0, 0, 0, 0))
        sizes[row["request_id"]] = Size(
            before.bytes_up + (row["bytes_up"] or 0), before.bytes_down + (row["bytes_down"] or 0),
            before.tokens_in + (row["tokens_in"] or 0), before.tokens_out + (row["tokens_out"] or 0), row["outcome"],
        )
    return sizes
