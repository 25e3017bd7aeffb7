"""The interface of a task of the world: invent a scene, write it, answer it as a persona would, and parse it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np

from untether.sim.population.world.persona import Taste, Traits


class Scene(NamedTuple):
    """A text of a task and what it is about (`facts`, in the task's own terms)."""

    text: str
    facts: Any


class Item(NamedTuple):
    """A history item before it gets a date: input, output and form as in `sim.core.records.Interaction`."""

    input: str
    output: str
    form: str = "query"


@dataclass(frozen=True)
class Evidence:
    """What one item says about its writer.

    `choices`: (dimension, values that fit what was seen). `likelihood`, if any, maps weights `[particles, weights]`
    to log-likelihoods `[particles]`.
    """

    choices: tuple[tuple[int, tuple[int, ...]], ...] = ()
    facts: Any = None
    output: str = ""


class WorldTask(Protocol):
    """One task of the world.

    `read` returns None for a text that is not of this world; `reading` returns what a text is about, for any reader.
    """

    name: str
    traits: Traits

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene: ...
    def answer(self, scene: Scene, taste: Taste) -> str: ...
    def item(self, rng: Random, taste: Taste) -> Item: ...
    def reading(self, scene: Scene) -> str: ...
    def read(self, text: str) -> Scene | None: ...
    def evidence(self, item: Item) -> Evidence | None: ...
    def log_likelihood(self, evidence: Iterable[Evidence], weights: np.ndarray) -> np.ndarray: ...


class QueryShaped:
    """For tasks whose history items look like their queries and whose personas have choices only."""

    def item(self, rng: Random, taste: Taste) -> Item:
        """Returns a dated item's content: a scene and the persona's answer to it."""
        scene = self.scene(rng, taste)
        return Item(scene.text, self.answer(scene, taste))

    def log_likelihood(self, evidence: Iterable[Evidence], weights: np.ndarray) -> np.ndarray:
        """Returns zeros `[particles]`: there are no weights to distinguish."""
        return np.zeros(len(weights))
