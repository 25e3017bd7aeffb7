"""LaMP-1: which of two references an author would cite; the author's own papers show which fields they care for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import exp
from random import Random

import numpy as np

from untether.sim.population.world.banks import Finder, capital, pick, pick_distinct
from untether.sim.population.world.base import Evidence, Item, Scene
from untether.sim.population.world.persona import Taste, Traits, stream
from untether.sim.population.world.tasks.papers import AREAS, FAMILIES, METHODS, PROBLEMS, Papers

TEMPERATURE = 0.4
_CONTENT = re.compile(r'"(?P<own>.*)" \[1\]: "(?P<first>.*)" \[2\]: "(?P<second>.*)"', re.DOTALL)
_TITLES = ("{method} for {problem} in {area}", "{problem} in {area} with {method}", "{area}: {problem} using {method}")


def _traits() -> Traits:
    rng = stream("average taste", "LaMP_1")
    areas = tuple((a, rng.gauss(0, 0.5), 1.0, 0.3) for a in AREAS)
    return Traits("LaMP_1", weights=(*areas, *((f, rng.gauss(0, 0.2), 0.4, 0.15) for f in FAMILIES)))


class Citations:
    """Weights: one an area, then one a family of methods. `facts`: (area, family) of each of the two references."""

    name = "LaMP_1"
    traits = _traits()

    def __init__(self) -> None:
        self._papers = Papers()
        areas = {p: ("area", i) for i, ps in enumerate(PROBLEMS) for p in ps}
        families = {m: ("family", i) for i, ms in enumerate(METHODS) for m in ms}
        self._finder = Finder(areas | families)

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene:
        """Returns a paper of the user's and two references from different areas and families."""
        areas, families = pick_distinct(rng, range(len(AREAS)), 2), pick_distinct(rng, range(len(FAMILIES)), 2)
        own = self._title(rng, *self._own(rng, taste))
        first, second = (self._title(rng, a, f) for a, f in zip(areas, families, strict=True))
        return Scene(f'"{own}" [1]: "{first}" [2]: "{second}"', tuple(zip(areas, families, strict=True)))

    def answer(self, scene: Scene, taste: Taste) -> str:
        """Returns the reference whose area and family weigh more."""
        first, second = (taste.weights[a] + taste.weights[len(AREAS) + f] for a, f in scene.facts)
        return "[1]" if first >= second else "[2]"

    def item(self, rng: Random, taste: Taste) -> Item:
        """Returns a paper by the user: abstract and title, on what the user likes to work on."""
        area, family = self._own(rng, taste)
        problem, method = pick(rng, PROBLEMS[area]), pick(rng, METHODS[family])
        text = self._papers.abstract(rng, f"{problem} in {AREAS[area]}", method).text
        title = _TITLES[0].format(method=method, problem=problem, area=AREAS[area])
        return Item(text, capital(title), "title")

    def reading(self, scene: Scene) -> str:
        """Returns what the text is about, for any reader."""
        return ", ".join(f"[{i}] {AREAS[a]} {FAMILIES[f]}" for i, (a, f) in enumerate(scene.facts, 1))

    def read(self, text: str) -> Scene | None:
        """Returns the two references of a query; None where the text is none or a reference is unknown."""
        match = _CONTENT.fullmatch(text.strip())
        if match is None:
            return None
        facts = tuple(self._topic(match[which]) for which in ("first", "second"))
        return None if None in facts else Scene(text, facts)

    def evidence(self, item: Item) -> Evidence | None:
        """Returns the evidence of an item: of a query, which reference won; of a paper, its area and family."""
        if (scene := self.read(item.input)) is not None:
            return Evidence(facts=scene.facts, output=item.output) if item.output in ("[1]", "[2]") else None
        topic = self._topic(item.output)
        return None if topic is None else Evidence(facts=topic)

    def log_likelihood(self, evidence: Iterable[Evidence], weights: np.ndarray) -> np.ndarray:
        """Returns the log-likelihood [particles]: softmax choice of areas and families, logistic choice of references.
        """
        total = np.zeros(len(weights))
        cut = len(AREAS)
        areas, families = weights[:, :cut] / TEMPERATURE, weights[:, cut:] / TEMPERATURE
        norm = np.logaddexp.reduce(areas, axis=1) + np.logaddexp.reduce(families, axis=1)
        for seen in evidence:
            if seen.output:
                (a, f), (b, g) = seen.facts
                gap = areas[:, a] + families[:, f] - areas[:, b] - families[:, g]
                total -= np.logaddexp(0, -gap if seen.output == "[1]" else gap)
            else:
                area, family = seen.facts
                total += areas[:, area] + families[:, family] - norm
        return total

    def _own(self, rng: Random, taste: Taste | None) -> tuple[int, int]:
        if taste is None:
            return int(rng.random() * len(AREAS)), int(rng.random() * len(FAMILIES))
        return _draw(rng, taste.weights[: len(AREAS)]), _draw(rng, taste.weights[len(AREAS) :])

    def _title(self, rng: Random, area: int, family: int) -> str:
        words = {"method": pick(rng, METHODS[family]), "problem": pick(rng, PROBLEMS[area]), "area": AREAS[area]}
        return capital(pick(rng, _TITLES).format(**words))

    def _topic(self, text: str) -> tuple[int, int] | None:
        found = dict(self._finder.find(text))
        return (found["area"], found["family"]) if len(found) == 2 else None


def _draw(rng: Random, weights: tuple[float, ...]) -> int:
    odds = [exp(w / TEMPERATURE) for w in weights]
    left = rng.random() * sum(odds)
    for index, odd in enumerate(odds):
        left -= odd
        if left < 0:
            return index
    return len(odds) - 1
