"""The embedded world: users whose preferences are known, so that an effect, a filter or a drift has a ground truth.

Real data never shows what its users really prefer. Here everything about a user follows from (split, seed, index) and
the time. Texts are plain English; tasks have LaMP's shapes (LaMP-1, 2, 3, 4, 5 and 7).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple

from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction, Query, User
from untether.sim.experiment.virtual_sections import Drift
from untether.sim.population.world.base import Item, Scene, WorldTask
from untether.sim.population.world.drift import progress
from untether.sim.population.world.persona import (
    ARCHETYPES,
    Taste,
    archetype,
    blend,
    pick_archetype,
    stream,
    with_quirks,
)
from untether.sim.population.world.tasks.citations import Citations
from untether.sim.population.world.tasks.news import News
from untether.sim.population.world.tasks.papers import Papers
from untether.sim.population.world.tasks.plots import Plots
from untether.sim.population.world.tasks.posts import Posts
from untether.sim.population.world.tasks.reviews import Reviews

__all__ = ["NOW_S", "SPLITS", "WORLD_TASKS", "Persona", "World", "world_task"]

NOW_S = 1_735_689_600.0  # 2025-01-01: histories end here, queries begin
ITEM_HOUR, QUERY_HOUR = 9, 18  # of the day
SPLITS = tuple(ARCHETYPES)
_BY_NAME: dict[str, WorldTask] = {t.name: t for t in (Citations(), Plots(), Reviews(), News(), Papers(), Posts())}
WORLD_TASKS = tuple(_BY_NAME)
_USER_ID = re.compile(r"world-(\w+)-s(\d+)-(\d+)")


def world_task(name: str) -> WorldTask:
    """Returns the world's implementation of a task.

    Raises:
        UserError: The world does not have it; the message lists the tasks it has.
    """
    if name not in _BY_NAME:
        raise UserError(f"the world has no task {name!r}: it has {', '.join(WORLD_TASKS)}")
    return _BY_NAME[name]


class Persona(NamedTuple):
    """A user's preferences in one task at one time: `taste`, and the drift from `archetype` to `target`."""

    taste: Taste
    archetype: int
    target: int
    progress: float


@dataclass(frozen=True)
class World:
    """The users of one run. Different `seed`s draw disjoint users; `drift` is the schedule by which they change."""

    seed: int = 0
    drift: Drift = Drift()
    history_days: float = 120.0
    query_days: float = 30.0

    def user_id(self, index: int, split: str = "evaluation") -> str:
        """Returns the id of a user; it holds split, seed and index, so the persona can be found from it."""
        if split not in ARCHETYPES:
            raise UserError(f"the world has no split {split!r}: it has {', '.join(SPLITS)}")
        return f"world-{split}-s{self.seed}-{index:05d}"

    def persona(self, user_id: str, task: str, time_s: float = NOW_S) -> Persona:
        """Returns the persona of any user of the world (of any seed) in a task at a time."""
        return self._changing(user_id, task).at(time_s)

    def cluster(self, user_id: str) -> str:
        """Returns what makes a user like others: the archetype they start from, in all tasks."""
        return f"archetype-{self._changing(user_id, WORLD_TASKS[0]).archetype}"

    def progress(self, user_id: str, task: str, time_s: float) -> float:
        """Returns how far any user of the world has changed from the old persona (0) to the new one (1) at a time."""
        return self._changing(user_id, task).progress(time_s)

    def _changing(self, user_id: str, task: str) -> _Changing:
        match = _USER_ID.fullmatch(user_id)
        if match is None or match[1] not in ARCHETYPES:
            raise UserError(f"{user_id!r} is no user of the world: ids look like {self.user_id(0)}")
        return _Changing(user_id, match[1], world_task(task), self.drift)

    def user(
        self,
        index: int,
        split: str = "evaluation",
        tasks: Sequence[str] = WORLD_TASKS,
        history: tuple[int, int] = (4, 8),
        queries: int = 10,
        *,
        rounds: int = 0,
        arrivals: float = 0.0,
    ) -> User:
        """Returns a user with a history and queries. No text occurs twice.

        Histories end at `NOW_S`; queries follow on distinct days where `query_days` allows.

        With `rounds`, the user lives on for so many days: new items come at 9:00, known from the next day's round on,
        and the queries are asked at 18:00, each in its own day's round. What happens on a day depends on no later day,
        and at the same density of queries on no number of rounds.

        Args:
            index: Number of the user.
            split: The world's split.
            tasks: The user's tasks.
            history: Fewest and most items a task.
            queries: Queries a task.
            rounds: Days that the user lives on.
            arrivals: New items a day on average.
        """
        user_id = self.user_id(index, split)
        items: list[Interaction] = []
        asked: list[Query] = []
        for name in tasks:
            story = _Story(_Changing(user_id, split, world_task(name), self.drift), user_id)
            new_days, query_days = self._days(user_id, name, queries, rounds, arrivals)
            days = [*self._past_days(user_id, name, history), *new_days]
            items_at = [(day, ITEM_HOUR, number) for number, day in enumerate(days)]
            queries_at = [(day, QUERY_HOUR, number) for number, day in enumerate(query_days)]
            for day, hour, number in sorted(items_at + queries_at):
                time_s = NOW_S + DAY_S * day + 3600 * hour
                if hour == ITEM_HOUR:
                    items.append(story.interaction(number, time_s, max(0, day + 1) if rounds else 0))
                else:
                    visible = sum(before < day for before in days)
                    asked.append(story.query(number, time_s, visible, day if rounds else None))
        items.sort(key=lambda item: item.time_s)
        asked.sort(key=lambda query: query.time_s)
        return User(user_id, tuple(items), tuple(asked), self.cluster(user_id))

    def asked(
        self, index: int, split: str, tasks: Sequence[str], queries: int, *, rounds: int = 0, arrivals: float = 0.0
    ) -> list[tuple[str, int | None]]:
        """Returns the task and the round of each query of `user`, in their order, without writing any of them."""
        user_id = self.user_id(index, split)
        found = [
            (day, name) for name in tasks for day in sorted(self._days(user_id, name, queries, rounds, arrivals)[1])
        ]
        found.sort(key=lambda query: query[0])
        return [(name, day if rounds else None) for day, name in found]

    def _past_days(self, user_id: str, task: str, history: tuple[int, int]) -> list[int]:
        rng, (least, most) = stream("timeline", user_id, task), history
        past = least + int(rng.random() * (most - least + 1))
        return sorted(-1 - int(rng.random() * self.history_days) for _ in range(past))

    def _days(
        self, user_id: str, task: str, queries: int, rounds: int, arrivals: float
    ) -> tuple[list[int], list[int]]:
        """(days of the items that come later, days of the queries)."""
        if not rounds:
            return [], [int((i + 0.5) / queries * self.query_days) for i in range(queries)]
        rng = stream("rounds", user_id, task)
        return _arrival_days(rng, rounds, arrivals), _query_days(rng, rounds, queries)


def _arrival_days(rng: Random, rounds: int, arrivals: float) -> list[int]:
    """The days of the items that come: as even as `arrivals` a day can be, from a user's own start."""
    start = rng.random()
    upto = [int(start + arrivals * day) for day in range(rounds + 1)]
    return [day for day in range(rounds) for _ in range(upto[day + 1] - upto[day])]


def _query_days(rng: Random, rounds: int, queries: int) -> list[int]:
    """The days of the queries: as even as can be, from a user's own start. In whole numbers: only the ratio counts."""
    start = int(rng.random() * 1000)
    return [(1000 * number + start) * rounds // (1000 * queries) for number in range(queries)]


class _Changing:
    """One user's taste in one task through time."""

    def __init__(self, user_id: str, split: str, task: WorldTask, drift: Drift) -> None:
        self.task, self._drift, self._user_id = task, drift, user_id
        rng = stream("persona", user_id)
        self.archetype, self.target = pick_archetype(rng, split), pick_archetype(rng, split)
        self._phase = rng.random()
        self._changes = rng.random() < drift.share

    @cached_property
    def _before(self) -> Taste:
        rng = stream("quirks", self._user_id, self.task.name)
        return with_quirks(self.task.traits, archetype(self.task.traits, self.archetype), rng)

    @cached_property
    def _after(self) -> Taste:
        rng = stream("later quirks", self._user_id, self.task.name)
        return with_quirks(self.task.traits, archetype(self.task.traits, self.target), rng)

    def at(self, time_s: float) -> Persona:
        share = self.progress(time_s)
        taste = self._before
        if share > 0:
            taste = blend(taste, self._after, share, stream("thresholds", self._user_id, self.task.name))
        return Persona(taste, self.archetype, self.target, share)

    def progress(self, time_s: float) -> float:
        return progress(self._drift, (time_s - NOW_S) / DAY_S, self._phase) if self._changes else 0.0


class _Story:
    """Writes one user's items and queries of a task, never the same text twice."""

    def __init__(self, who: _Changing, user_id: str) -> None:
        self._who, self._user_id = who, user_id
        self._used: set[str] = set()

    def interaction(self, number: int, time_s: float, round: int) -> Interaction:
        task = self._who.task
        taste = self._who.at(time_s).taste
        rng = stream("item", self._user_id, task.name, number)
        item = task.item(rng, taste)
        while not self._used.isdisjoint(_texts(item)):
            item = task.item(rng, taste)
        self._used.update(_texts(item))
        item_id = f"{self._user_id}-{task.name}-{number}"
        return Interaction(item_id, task.name, item.input, item.output, time_s, item.form, round)

    def query(self, number: int, time_s: float, visible: int, round: int | None) -> Query:
        task = self._who.task
        taste = self._who.at(time_s).taste
        rng = stream("query", self._user_id, task.name, number)
        scene: Scene = task.scene(rng, taste)
        while scene.text in self._used or scene.text + task.answer(scene, taste) in self._used:
            scene = task.scene(rng, taste)
        self._used.add(scene.text)
        query_id = f"{self._user_id}-{task.name}-q{number}"
        return Query(query_id, task.name, scene.text, task.answer(scene, taste), time_s, visible, round)


def _texts(item: Item) -> set[str]:
    """What must not occur again: the pair and, where it is shaped like a query, its input whatever the answer."""
    return {item.input + item.output, *([item.input] if item.form == "query" else [])}
