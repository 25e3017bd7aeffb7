"""Training data from other people: the items of disjoint users, without those on which an evaluated user is scored.

Which people share a scored text depends on the data: co-authors share papers, news is syndicated, and people of the
embedded world, whose words are few, sometimes write the same. So every item is compared with every query of the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from untether.sim.core.records import Interaction, User
from untether.sim.population.leaks import unscored
from untether.sim.population.order import known_history, over_before
from untether.sim.population.source import Population

NOT_OLDER = "shared: item is not older than every query"
SCORED = "shared: item holds what a user is scored on"


def shared_items(
    population: Population, task: str, users: Sequence[User] | None = None
) -> tuple[list[Interaction], Counter[str]]:
    """Returns the items of a task that the `shared` arm may train on, and how many were left out, by reason.

    Dated items count only if they are surely of a day before any evaluated query; no item may hold the input of an
    evaluated user's query or, where the task asks for free text, its gold (`sim.population.leaks.unscored`), whatever
    its date.

    Args:
        population: The users of the seed.
        task: The task.
        users: `population.shared_users()`, if it was read already.
    """
    users = population.shared_users() if users is None else users
    return _free(population, task, [item for user in users for item in known_history(user, task, 0)])


def open_items(
    population: Population, items: Sequence[Interaction]
) -> tuple[frozenset[Interaction], Counter[str]]:
    """Returns the items of evaluated users that others may train on, and how many were left out, by reason.

    The rule is that of `shared_items`. Where histories are replayed, the round says what is older than a query, and
    dates do not count.
    """
    left: list[Interaction] = []
    counts: Counter[str] = Counter()
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        found, excluded = _free(population, task, own, dated=not population.experiment.population.replay)
        left += found
        counts.update(excluded)
    return frozenset(left), counts


def _free(
    population: Population, task: str, items: Sequence[Interaction], dated: bool = True
) -> tuple[list[Interaction], Counter[str]]:
    first_s = population.first_query_s() if dated else None
    older = [item for item in items if first_s is None or item.time_s is None or over_before(item, first_s)]
    left = unscored(older, population.scored(task))
    return left, +Counter({NOT_OLDER: len(items) - len(older), SCORED: len(older) - len(left)})
