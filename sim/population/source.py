"""Sources of users: one interface for the embedded world, for LaMP files and for plug-ins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from untether.sim.core.errors import UserError
from untether.sim.core.kinds import POPULATIONS
from untether.sim.core.records import Exclusion, Query, User
from untether.sim.experiment import Experiment
from untether.sim.population.lamp import read_lamp
from untether.sim.population.order import order_of
from untether.sim.population.replay import Replay
from untether.sim.population.tasks import get_task
from untether.sim.population.world import NOW_S, WORLD_TASKS, World
from untether.sim.population.world.truth import truth_rows


class Population(Protocol):
    """The users of one seed. Device i is user i; `order` is `time` where dates prove it, else `unknown`.

    A user's own population derives from it and defines at least `order`, its length, and `user`.
    """

    order: str

    def __len__(self) -> int: ...

    def user(self, index: int) -> User:
        """Returns the user of device `index`."""
        ...

    def asked(self, index: int) -> Sequence[tuple[str, int | None]]:
        """Returns the task and the round of each query of a user, in their order, which planning needs."""
        return [(query.task, query.round) for query in self.user(index).queries]

    def scored(self, task: str) -> Iterator[Query]:
        """Yields all queries of a task, of every user and round."""
        return (query for index in range(len(self)) for query in self.user(index).queries if query.task == task)

    def shared_users(self) -> Sequence[User]:
        """Returns disjoint users, for the `shared` arm."""
        return []

    def first_query_s(self) -> float | None:
        """Returns when the first query of any user is asked: shared items must be older. None where nothing is dated.
        """
        users = (self.user(index) for index in range(len(self)))
        dates = (query.time_s for user in users for query in user.queries if query.time_s is not None)
        return min(dates, default=None)

    def exclusions(self) -> Counter[str]:
        """Returns how many users, questions and items were left out, by reason."""
        return Counter()


@dataclass
class FromFiles(Population):
    """Users drawn from LaMP files: those of this seed, and disjoint others for the `shared` arm."""

    experiment: Experiment
    seed: int

    @cached_property
    def _users(self) -> tuple[list[User], list[Exclusion]]:
        population = self.experiment.population
        return self._read(population.users, self.experiment.seeds.index(self.seed), population.skip_users, fewer=False)

    def __len__(self) -> int:
        return len(self._users[0])

    def user(self, index: int) -> User:
        return self._users[0][index]

    @property
    def order(self) -> str:
        return "time" if all(order_of(user) == "time" for user in self._users[0]) else "unknown"

    def shared_users(self) -> Sequence[User]:
        population = self.experiment.population
        drawn = population.skip_users + population.users * len(self.experiment.seeds)
        return self._read(population.shared_users, 0, drawn, fewer=True)[0] if population.shared_users else []

    def exclusions(self) -> Counter[str]:
        return Counter(item.reason for item in self._users[1])

    def _read(self, users: int, seed_index: int, skip: int, fewer: bool) -> tuple[list[User], list[Exclusion]]:
        population = self.experiment.population
        return read_lamp(
            population.path, population.tasks, population.split or "dev", users, seed_index, skip=skip,
            min_history=population.min_history, queries=population.queries, fewer=fewer,
            replay=Replay(self.experiment.rounds, population.round_days) if population.replay else None,
        )


@dataclass
class FromWorld(Population):
    """Users of the embedded world, made on demand: a fleet of any size takes no memory."""

    experiment: Experiment
    seed: int
    order: str = "time"

    def __len__(self) -> int:
        return self.experiment.population.users

    @cached_property
    def world(self) -> World:
        """The world that the users are of."""
        return World(self.seed, self.experiment.drift)

    @cached_property
    def tasks(self) -> Sequence[str]:
        """The tasks that every user has."""
        return [get_task(task).name for task in self.experiment.population.tasks] or WORLD_TASKS

    def truth(self) -> Iterator[list[dict[str, Any]]]:
        """Yields the rows of `truth.parquet`, a list a round."""
        users = {device_id(index): self.world.user_id(index, self._split) for index in range(len(self))}
        return truth_rows(self.world, users, self.tasks, self.experiment.rounds)

    @property
    def _rounds(self) -> int:
        return self.experiment.rounds if self.experiment.population.replay else 0

    @property
    def _split(self) -> str:
        return self.experiment.population.split or "evaluation"

    def user(self, index: int) -> User:
        return self._with(index, self.tasks)

    def _with(self, index: int, tasks: Sequence[str]) -> User:
        """The user as it is in some of its tasks: what happens in one depends on no other."""
        population = self.experiment.population
        return self.world.user(
            index, self._split, tasks, population.history, population.queries,
            rounds=self._rounds, arrivals=population.arrivals,
        )

    def scored(self, task: str) -> Iterator[Query]:
        return (query for index in range(len(self)) for query in self._with(index, [task]).queries)

    def asked(self, index: int) -> list[tuple[str, int | None]]:
        population = self.experiment.population
        return self.world.asked(
            index, self._split, self.tasks, population.queries, rounds=self._rounds, arrivals=population.arrivals
        )

    def shared_users(self) -> Sequence[User]:
        return [self.user(len(self) + number) for number in range(self.experiment.population.shared_users)]

    def first_query_s(self) -> float:
        return NOW_S


class OnlyUser(Population):
    """One user's data as those of device `device`: a node's own."""

    def __init__(self, data: Population, device: int):
        self.data, self.device = data, device

    def __len__(self) -> int:
        return self.device + 1

    @property
    def order(self) -> str:
        return self.data.order

    def user(self, index: int) -> User:
        if index != self.device:
            raise UserError(f"this node has the data of device {self.device}, not of device {index}")
        return self.data.user(0)

    def exclusions(self) -> Counter[str]:
        return self.data.exclusions()


def device_id(index: int) -> str:
    """Returns the name of device `index`, sortable up to 100,000 devices."""
    return f"d{index:05d}"


def open_population(experiment: Experiment, seed: int) -> Population:
    """Returns the users of one seed of an experiment.

    Raises:
        UserError: A file is missing or malformed, or a task is unknown.
    """
    population = experiment.population
    found = POPULATIONS.bind(population.source, experiment.settings)(experiment, seed)
    return found if population.only < 0 else OnlyUser(found, population.only)
