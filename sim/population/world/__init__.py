"""The embedded world: users whose preferences are known, so that an effect, a filter or a drift has a ground truth.

Real data never tells what its users really prefer. Here everything about a user follows from (split, seed, index) and
the time. Texts are plain English; tasks have LaMP's shapes (LaMP-1, 2, 3, 4, 5 and 7).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from sim.errors import UserError
from sim.population.world.base import Scene, WorldTask
from sim.population.world.citations import Citations
from sim.population.world.drift import DAY_S, Drift
from sim.population.world.news import News
from sim.population.world.papers import Papers
from sim.population.world.persona import ARCHETYPES, Taste, archetype, blend, pick_archetype, stream, with_quirks
from sim.population.world.plots import Plots
from sim.population.world.posts import Posts
from sim.population.world.reviews import Reviews
from sim.records import Interaction, Query, User

__all__ = ["NOW_S", "SPLITS", "TASKS", "Drift", "Persona", "World", "world_task"]

NOW_S = 1_735_689_600.0  # 2025-01-01: histories end here, queries begin
SPLITS = tuple(ARCHETYPES)
_BY_NAME: dict[str, WorldTask] = {t.name: t for t in (Citations(), Plots(), Reviews(), News(), Papers(), Posts())}
TASKS = tuple(_BY_NAME)
_USER_ID = re.compile(r"world-(\w+)-s(\d+)-(\d+)")


def world_task(name: str) -> WorldTask:
    """The world's side of a task. Raises UserError, listing the known ones, for a task that it does not have."""
    if name not in _BY_NAME:
        raise UserError(f"the world has no task {name!r}: it has {', '.join(TASKS)}")
    return _BY_NAME[name]


class Persona(NamedTuple):
    """Who a user is in one task at one time: `taste`, and how far they drifted from `archetype` to `target`."""

    taste: Taste
    archetype: int
    target: int
    progress: float


@dataclass(frozen=True)
class World:
    """The users of one run: `seed` draws disjoint ones. `drift` is the schedule by which they change."""

    seed: int = 0
    drift: Drift = Drift()
    history_days: float = 120.0
    query_days: float = 30.0

    def user_id(self, index: int, split: str = "evaluation") -> str:
        """The id of a user; it carries split, seed and index, so the persona can be found from it."""
        if split not in ARCHETYPES:
            raise UserError(f"the world has no split {split!r}: it has {', '.join(SPLITS)}")
        return f"world-{split}-s{self.seed}-{index:05d}"

    def persona(self, user_id: str, task: str, time_s: float = NOW_S) -> Persona:
        """The persona of any user of the world (of any seed) in a task at a time."""
        match = _USER_ID.fullmatch(user_id)
        if match is None or match[1] not in ARCHETYPES:
            raise UserError(f"{user_id!r} is no user of the world: ids look like {self.user_id(0)}")
        return _Changing(user_id, match[1], world_task(task), self.drift).at(time_s)

    def user(
        self,
        index: int,
        split: str = "evaluation",
        tasks: Sequence[str] = TASKS,
        history: tuple[int, int] = (4, 8),
        queries: int = 10,
        later: int = 0,
    ) -> User:
        """A user with `history` items (least, most) and `queries` queries a task.

        Histories end at `NOW_S`; queries follow on distinct days where `query_days` allows. `later` more items a task
        fall among the queries (for runs of many rounds): a query's `visible` counts what is strictly earlier, by day.
        No text occurs twice.
        """
        user_id = self.user_id(index, split)
        items: list[Interaction] = []
        asked: list[Query] = []
        for name in tasks:
            rng = stream("timeline", user_id, name)
            least, most = history
            past = least + int(rng.random() * (most - least + 1))
            story = _Story(_Changing(user_id, split, world_task(name), self.drift), user_id)
            before = sorted(NOW_S - DAY_S * (1 + int(rng.random() * self.history_days)) for _ in range(past))
            after = sorted(NOW_S + DAY_S * int(rng.random() * self.query_days) for _ in range(later))
            mine = [story.interaction(i, t + 3600 * 9) for i, t in enumerate([*before, *after])]
            for i in range(queries):
                day = int((i + 0.5) / queries * self.query_days)
                time_s = NOW_S + DAY_S * day + 3600 * 18
                visible = sum(x.time_s < NOW_S + DAY_S * day for x in mine)
                asked.append(story.query(i, time_s, visible))
            items.extend(mine)
        items.sort(key=lambda item: item.time_s)
        asked.sort(key=lambda query: query.time_s)
        return User(user_id, tuple(items), tuple(asked))


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
        progress = self._drift.progress((time_s - NOW_S) / DAY_S, self._phase) if self._changes else 0.0
        taste = self._before
        if progress > 0:
            taste = blend(taste, self._after, progress, stream("thresholds", self._user_id, self.task.name))
        return Persona(taste, self.archetype, self.target, progress)


class _Story:
    """Writes one user's items and queries of a task, never the same text twice."""

    def __init__(self, who: _Changing, user_id: str) -> None:
        self._who, self._user_id = who, user_id
        self._told: set[str] = set()

    def interaction(self, number: int, time_s: float) -> Interaction:
        task = self._who.task
        taste = self._who.at(time_s).taste
        rng = stream("item", self._user_id, task.name, number)
        item = task.item(rng, taste)
        while item.input + item.output in self._told:
            item = task.item(rng, taste)
        self._told.add(item.input + item.output)
        item_id = f"{self._user_id}-{task.name}-{number}"
        return Interaction(item_id, task.name, item.input, item.output, time_s, item.form)

    def query(self, number: int, time_s: float, visible: int) -> Query:
        task = self._who.task
        taste = self._who.at(time_s).taste
        rng = stream("query", self._user_id, task.name, number)
        scene: Scene = task.scene(rng, taste)
        while scene.text in self._told or scene.text + task.answer(scene, taste) in self._told:
            scene = task.scene(rng, taste)
        self._told.add(scene.text)
        query_id = f"{self._user_id}-{task.name}-q{number}"
        return Query(query_id, task.name, scene.text, task.answer(scene, taste), time_s, visible)
