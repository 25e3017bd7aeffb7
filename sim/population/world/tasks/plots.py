"""LaMP-2 (movies): a plot shows two or three themes, and the user's tag is the one that matters most to them."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import numpy as np

from untether.sim.population.tasks import MOVIE_TAGS
from untether.sim.population.world.banks import Finder, article, bank, common, pick, pick_distinct, split
from untether.sim.population.world.base import Evidence, Item, QueryShaped, Scene
from untether.sim.population.world.persona import Taste, Traits, stream

TEMPERATURE = 0.25


def _means() -> tuple[float, ...]:
    rng = stream("average taste", "LaMP_2")
    return tuple(rng.gauss(0, 0.5) for _ in MOVIE_TAGS)


class Plots(QueryShaped):
    """Weights: one for each tag. `facts`: the tags whose themes the plot shows, in order of appearance."""

    name = "LaMP_2"
    traits = Traits(name, weights=tuple((t, m, 1.0, 0.35) for t, m in zip(MOVIE_TAGS, _means(), strict=True)))

    def __init__(self) -> None:
        words = bank("plots")
        self._cues = [split(words["theme"][tag]) for tag in MOVIE_TAGS]
        self._finder = Finder({cue: tag for tag, cues in enumerate(self._cues) for cue in cues})
        self._setting, self._link, self._aside = (split(words[k]) for k in ("setting", "link", "aside"))
        self._first, self._job, self._trait = common("first"), common("job"), common("trait")

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene:
        """Returns a plot of two themes (or three, one time in three)."""
        tags = pick_distinct(rng, range(len(MOVIE_TAGS)), 3 if rng.random() < 1 / 3 else 2)
        cues = [pick(rng, self._cues[tag]) for tag in tags]
        job, trait = pick(rng, self._job), pick(rng, self._trait)
        name, setting, link = pick(rng, self._first), pick(rng, self._setting), pick(rng, self._link)
        aside = pick(rng, self._aside) + ". " if rng.random() < 0.5 else ""
        start = f"{name} is {article(trait)} {trait} {job} {setting} who {cues[0]}. "
        middle = f"{aside}{link} the {job} {cues[1]}"
        return Scene(start + middle + (f" and {cues[2]}." if len(cues) > 2 else "."), tuple(tags))

    def answer(self, scene: Scene, taste: Taste) -> str:
        """Returns the shown theme with the greatest weight."""
        return MOVIE_TAGS[max(scene.facts, key=lambda tag: taste.weights[tag])]

    def reading(self, scene: Scene) -> str:
        """Returns what the text is about, for any reader."""
        return ", ".join(MOVIE_TAGS[tag] for tag in scene.facts)

    def read(self, text: str) -> Scene | None:
        """Returns the themes of a plot; None where there are none."""
        tags = tuple(self._finder.find(text))
        return Scene(text, tags) if tags else None

    def evidence(self, item: Item) -> Evidence | None:
        """Returns which of the shown themes won."""
        scene = self.read(item.input)
        if scene is None or item.output not in MOVIE_TAGS:
            return None
        return Evidence(facts=scene.facts, output=item.output)

    def log_likelihood(self, evidence: Iterable[Evidence], weights: np.ndarray) -> np.ndarray:
        """Returns the log-likelihood [particles]: softmax choice among the shown themes."""
        total = np.zeros(len(weights))
        for seen in evidence:
            tags, won = list(seen.facts), MOVIE_TAGS.index(seen.output)
            if won in tags:
                shown = weights[:, tags] / TEMPERATURE
                total += shown[:, tags.index(won)] - np.logaddexp.reduce(shown, axis=1)
        return total
