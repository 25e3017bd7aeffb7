"""LaMP-3: a review's remarks praise or blame aspects of a product; users weigh them, and score, differently."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import numpy as np

from untether.sim.population.world.banks import Finder, article, bank, pick, pick_distinct, split
from untether.sim.population.world.base import Evidence, Item, QueryShaped, Scene
from untether.sim.population.world.persona import Taste, Traits

ASPECTS = ("price", "quality", "delivery", "looks", "comfort", "setup", "service", "power")


class Reviews(QueryShaped):
    """Weights: harshness (added to every score), then one an aspect. `facts`: (aspect, +1 or -1) of each remark."""

    name = "LaMP_3"
    traits = Traits(name, weights=(("harshness", 0.0, 1.0, 0.3), *((a, 0.7, 0.45, 0.15) for a in ASPECTS)))

    def __init__(self) -> None:
        words = bank("reviews")
        self._remarks = {
            (a, sign): split(words[tone][name])
            for sign, tone in ((1, "good"), (-1, "bad"))
            for a, name in enumerate(ASPECTS)
        }
        self._finder = Finder({text: fact for fact, texts in self._remarks.items() for text in texts})
        self._product, self._occasion, self._closing = (split(words[k]) for k in ("product", "occasion", "closing"))

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene:
        """Returns a review with two to four remarks."""
        lean = 0.25 + 0.5 * rng.random()
        aspects = pick_distinct(rng, range(len(ASPECTS)), 2 + int(rng.random() * 3))
        facts = tuple((a, 1 if rng.random() < lean else -1) for a in aspects)
        product, occasion = pick(rng, self._product), pick(rng, self._occasion)
        opening = pick(rng, ("I bought this {}", "This is {} I got"))
        opening = opening.format(product if "this" in opening else f"{article(product)} {product}") + f" {occasion}"
        sentences = [opening, *(pick(rng, self._remarks[fact]) for fact in facts)]
        if rng.random() < 0.5:
            sentences.append(pick(rng, self._closing))
        return Scene(". ".join(sentences) + ".", facts)

    def answer(self, scene: Scene, taste: Taste) -> str:
        """Returns 3 + harshness + the weighted remarks, rounded into 1 to 5."""
        value = 3 + taste.weights[0] + sum(sign * taste.weights[1 + a] for a, sign in scene.facts)
        return str(min(5, max(1, int(value + 0.5))))

    def reading(self, scene: Scene) -> str:
        """Returns what the text is about, for any reader."""
        return ", ".join(f"{ASPECTS[a]} {'good' if sign > 0 else 'bad'}" for a, sign in scene.facts)

    def read(self, text: str) -> Scene | None:
        """Returns the remarks of a review; None where there are none."""
        facts = tuple(self._finder.find(text))
        return Scene(text, facts) if facts else None

    def evidence(self, item: Item) -> Evidence | None:
        """Returns which score the remarks got."""
        scene = self.read(item.input)
        if scene is None or item.output not in set("12345"):
            return None
        return Evidence(facts=scene.facts, output=item.output)

    def log_likelihood(self, evidence: Iterable[Evidence], weights: np.ndarray) -> np.ndarray:
        """Returns the log-likelihood [particles]: Gaussian error of half a star, one-sided at 1 and 5."""
        total = np.zeros(len(weights))
        for seen in evidence:
            value = 3 + weights[:, 0]
            for aspect, sign in seen.facts:
                value = value + sign * weights[:, 1 + aspect]
            total -= (np.clip(value, 0.7, 5.3) - float(seen.output)) ** 2 / (2 * 0.4**2)
        return total
