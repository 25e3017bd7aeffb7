"""Who takes part in a round of training together: `strategy.select`. Every draw comes from (seed, round)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from untether.sim.core.seeding import generator
from untether.sim.experiment.strategy_section import Strategy


@dataclass(frozen=True, slots=True)
class Candidates:
    """The devices that could take part.

    Args:
        seed: Of the fleet.
        round: From 0.
        devices: Their numbers, in order: those that are due and have data.
        last: The round in which a device took part last; -1 before it ever did.
        items: How many examples it has.
        tokens: How many tokens it would train on.
        online: Whether it has a link at some time of the round.
    """

    seed: int
    round: int
    devices: tuple[int, ...]
    last: Callable[[int], int]
    items: Callable[[int], int]
    tokens: Callable[[int], int]
    online: Callable[[int], bool]

    def shuffled(self) -> list[int]:
        """Returns the devices in random order: what decides between equals."""
        order = generator(self.seed, self.round, "select").permutation(len(self.devices))
        return [self.devices[place] for place in order]

    def share(self, fraction: float) -> int:
        """Returns how many a fraction of the devices are: at least one, where there is one."""
        return min(len(self.devices), max(1, math.floor(fraction * len(self.devices) + 1e-9)))


def all(candidates: Candidates, settings: Strategy) -> Iterable[int]:
    """Selects everybody."""
    return candidates.devices


def random(candidates: Candidates, settings: Strategy) -> Iterable[int]:
    """Returns a random `fraction`."""
    return candidates.shuffled()[: candidates.share(settings.fraction)]


def available(candidates: Candidates, settings: Strategy) -> Iterable[int]:
    """Returns those that have a link in the round."""
    return filter(candidates.online, candidates.devices)


def stalest_first(candidates: Candidates, settings: Strategy) -> Iterable[int]:
    """Returns the `fraction` that took part longest ago."""
    return sorted(candidates.shuffled(), key=candidates.last)[: candidates.share(settings.fraction)]


def least_data_first(candidates: Candidates, settings: Strategy) -> Iterable[int]:
    """Returns the `fraction` with the fewest examples."""
    return sorted(candidates.shuffled(), key=candidates.items)[: candidates.share(settings.fraction)]


def within_budget(candidates: Candidates, settings: Strategy) -> Iterable[int]:
    """Selects in random order, each whose tokens still fit into `budget_tokens`."""
    left, chosen = settings.budget_tokens, []
    for device in candidates.shuffled():
        if (tokens := candidates.tokens(device)) <= left:
            left -= tokens
            chosen.append(device)
    return chosen
