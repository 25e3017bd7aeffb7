"""The personas of the world's users: an archetype shared with others, plus quirks of their own.

A persona has, for every task, *choices* (one value on each of several independent dimensions, such as the verb a user
prefers for "opened") and *weights* (real numbers, such as how much each theme of a film matters). Archetypes are
related: each belongs to one school a task, so the unseen part of a new one can be inferred from many known ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from untether.sim.core.seeding import derive

WORLD = 2024  # the seed of everything that all runs share: schools and archetypes
SCHOOLS = 6
FACTORS = 4
LOYALTY = 0.75  # how often an archetype follows its school on a dimension
QUIRK = 0.12  # how often a user departs from the archetype on a dimension

ARCHETYPES = {
    "pretraining": tuple(range(48)),
    "validation": tuple(range(100, 112)),
    "evaluation": tuple(range(200, 224)),
}


@dataclass(frozen=True)
class Traits:
    """The dimensions on which personas differ in one task.

    `choices` are (name, group, number of values): dimensions of one group tend to go together in a school.
    `weights` are (name, population mean, archetype deviation, quirk deviation).
    """

    task: str
    choices: tuple[tuple[str, str, int], ...] = ()
    weights: tuple[tuple[str, float, float, float], ...] = ()


@dataclass(frozen=True)
class Taste:
    """One persona's values in one task: `choices` and `weights` in the order of the task's `Traits`."""

    choices: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def stream(*words: object) -> Random:
    """Returns a fast scalar random stream that follows from its words alone."""
    return Random(derive(WORLD, *words))


def pick_archetype(rng: Random, split: str) -> int:
    """Returns an archetype of `split`, uniformly."""
    return ARCHETYPES[split][int(rng.random() * len(ARCHETYPES[split]))]


@cache
def _school(traits: Traits, school: int) -> tuple[int, ...]:
    rng = stream("school", traits.task, school)
    lean: dict[str, int] = {}
    values = []
    for _, group, count in traits.choices:
        lean.setdefault(group, int(rng.random() * count))
        free = int(rng.random() * count)
        values.append(lean[group] % count if group and rng.random() < 0.85 else free)
    return tuple(values)


@cache
def _loadings(traits: Traits) -> tuple[tuple[float, ...], ...]:
    rng = stream("loadings", traits.task)
    return tuple(tuple(rng.gauss(0, 1 / FACTORS**0.5) for _ in range(FACTORS)) for _ in traits.weights)


@cache
def archetype(traits: Traits, index: int) -> Taste:
    """Returns the taste of archetype `index` in the task of `traits`."""
    rng = stream("archetype", traits.task, index)
    school = _school(traits, int(rng.random() * SCHOOLS))
    choices = []
    for usual, (_, _, count) in zip(school, traits.choices, strict=True):
        other = int(rng.random() * count)
        choices.append(usual if rng.random() < LOYALTY else other)
    factors = [rng.gauss(0, 1) for _ in range(FACTORS)]
    weights = [
        mean + spread * sum(a * b for a, b in zip(row, factors, strict=True))
        for (_, mean, spread, _), row in zip(traits.weights, _loadings(traits), strict=True)
    ]
    return Taste(tuple(choices), tuple(weights))


def with_quirks(traits: Traits, taste: Taste, rng: Random) -> Taste:
    """Returns `taste` as one person has it: some choices replaced, every weight moved a little."""
    choices = []
    for usual, (_, _, count) in zip(taste.choices, traits.choices, strict=True):
        other = int(rng.random() * count)
        choices.append(other if rng.random() < QUIRK else usual)
    weights = [w + rng.gauss(0, t[3]) for w, t in zip(taste.weights, traits.weights, strict=True)]
    return Taste(tuple(choices), tuple(weights))


def blend(before: Taste, after: Taste, share: float, thresholds: Random) -> Taste:
    """Returns a persona between `before` and `after`: weights move in proportion, choices change one after another.

    Args:
        before, after: The two personas.
        share: How far it has changed, 0 to 1.
        thresholds: Draws the order in which choices change.
    """
    if share <= 0:
        return before
    choices = [b if thresholds.random() < share else a for a, b in zip(before.choices, after.choices, strict=True)]
    weights = [a + share * (b - a) for a, b in zip(before.weights, after.weights, strict=True)]
    return Taste(tuple(choices), tuple(weights))
