"""What a data set holds before anything is run on it: users, histories, dates, what will be left out and why."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from untether.sim.core.records import User
from untether.sim.experiment import Experiment
from untether.sim.population.formats.jsonl import FromJsonl
from untether.sim.population.lamp import read_lamp
from untether.sim.population.order import known_history, order_of
from untether.sim.population.replay import Replay
from untether.sim.population.tasks import get_task


@dataclass(frozen=True, slots=True)
class TaskLook:
    """One task of a data set: users, items that may be learned from a user (least, median, most), queries, dates."""

    task: str
    kind: str
    users: int
    history: tuple[int, float, int]
    queries: int
    first: str
    last: str
    order: str


def look(experiment: Experiment) -> tuple[list[TaskLook], Counter[str], int]:
    """Returns by task, what would be left out by reason, and how many users there are in all."""
    population = experiment.population
    if population.source == "lamp":
        replay = Replay(experiment.rounds, population.round_days) if population.replay else None
        users, left_out = read_lamp(
            population.path, population.tasks, population.split or "dev", None,
            min_history=population.min_history, queries=population.queries, replay=replay,
        )  # fmt: skip
        return _tasks(users), Counter(item.reason for item in left_out), len(users)
    found = FromJsonl(experiment, experiment.seeds[0])
    return _tasks(found.everybody), found.exclusions(), len(found.everybody)


def _tasks(users: Sequence[User]) -> list[TaskLook]:
    rows = []
    for task in sorted({task for user in users for task in user.tasks}):
        own = [user for user in users if task in user.tasks]
        sizes = [len(known_history(user, task, 0)) for user in own]
        queries = [query for user in own for query in user.queries if query.task == task]
        times = [item.time_s for user in own for item in user.of_task(task) if item.time_s is not None]
        times += [query.time_s for query in queries if query.time_s is not None]
        orders = {order_of(user, task) for user in own}
        rows.append(TaskLook(
            task, get_task(task).kind, len(own), (min(sizes), statistics.median(sizes), max(sizes)), len(queries),
            _day(min(times, default=None)), _day(max(times, default=None)), "time" if orders == {"time"} else "unknown",
        ))  # fmt: skip
    return rows


def _day(time_s: float | None) -> str:
    return "\N{EN DASH}" if time_s is None else datetime.fromtimestamp(time_s, UTC).date().isoformat()
