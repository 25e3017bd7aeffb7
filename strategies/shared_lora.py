"""What the strategies that share LoRA adapters have in common.

A device's adapter is a stack of *blocks*, whose products add up. A strategy says which blocks a device wears and which
of their sides it trains (`local`), what of them travels (`upload`) and what stays (`keep`), what hosts' sums come to
(`combined`), and what answers (`worn`). What devices upload are terms of sums, weighed by their examples, so a host
adds up its devices' and traffic grows with hosts. Scaling is the same for all: lora.alpha / lora.rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from untether.sim.core.errors import UserError
from untether.sim.rounds.messages import STACK, SUM, Reply, joined
from untether.strategies.factors import Arrays, Factors, beside, check_targets, compact, rank_of, side_of
from untether.strategies.fleet import FleetStrategy
from untether.strategies.stock import DEVICE, Stock

WEIGHT = "weight"
"""The array that says how many examples the terms of a sum are of."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a device's adapter. `A`, `B`: whether that side is trained."""

    name: str
    factors: Factors
    A: bool = True
    B: bool = True


@dataclass(frozen=True, slots=True)
class Site:
    """A device in a round.

    Args:
        device: Its number in the fleet.
        round: From 0.
        rank: Of the adapter that it can train.
        examples: How many it trains on: its weight.
        init: The adapter from which the whole fleet begins, of `rank`: A random by the seed, B zero.
        fresh: Makes one that only this device and round have.
        private: What it kept of its last round of training; empty before that.
    """

    device: int
    round: int
    rank: int
    examples: int
    init: Factors
    fresh: Callable[[], Factors]
    private: Arrays = field(default_factory=dict)


class SharedLora(FleetStrategy):
    """Base of the strategies that share."""

    # --- the device's side ----------------------------------------------------------------------------------------

    def begin(self, init: Factors) -> dict[str, np.ndarray]:
        """Returns what is shared before the first round."""
        return {}

    @abstractmethod
    def local(self, shared: Arrays, site: Site) -> list[Block]:
        """Returns the blocks that a device trains, or trains on top of."""

    @abstractmethod
    def upload(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        """Returns what travels of a device's `trained` blocks: terms of sums (`sum/...`), or ranks to be stacked
        (`stack/block/A/...` [rank, in] and `stack/block/B/...` [rank, out], the transpose).
        """

    def keep(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        """Returns what stays on the device for its next round."""
        return {}

    @abstractmethod
    def worn(self, shared: Arrays, site: Site) -> Factors:
        """Returns the adapter that answers: of what is shared, and what the device kept."""

    @property
    def mu(self) -> float:
        """Weight of the proximal term of local training."""
        return 0.0

    # --- the server's side ----------------------------------------------------------------------------------------

    def sides(self, round: int) -> str:
        """Returns which sides of an adapter a device uploads in a round."""
        return "AB"

    @abstractmethod
    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        """Returns what is shared after the hosts' sums: names as uploaded, without `sum/`."""

    def aggregate(self, seed: int, round: int, shared: Arrays, replies: Sequence[Reply]) -> dict[str, np.ndarray]:
        """See `FleetStrategy.aggregate`. Groups of devices (see `strategy.by_task`) share nothing with each other."""
        arrays = joined(replies).arrays
        found = dict(shared)
        for group in dict.fromkeys(name.split("/")[0] for name in arrays):
            own, sums = in_group(shared, group), in_group(arrays, group)
            found = {name: array for name, array in found.items() if not name.startswith(f"{group}/")}
            found |= {f"{group}/{name}": array for name, array in self.group_after(seed, round, own, sums).items()}
        return found

    def group_after(self, seed: int, round: int, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        """Returns `aggregate` for one group."""
        plain = {name.removeprefix(SUM): array for name, array in sums.items()}
        return self.combined(shared, plain) if plain.get(WEIGHT, 0) > 0 else dict(shared)


class Averaging(SharedLora):
    """Base of the strategies in which what travels is averaged, array by array.

    The mean is over devices, weighed by their examples: sum n_k x_k / sum n_k. With `strategy.aggregate` a strategy of
    Flower takes the place of the mean: it is given each device's arrays as a node's reply.
    """

    @abstractmethod
    def averages(self, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        """Returns the arrays of a device that travel."""

    def upload(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        if self.stock is None:
            return weighed(self.averages(trained, site), site.examples)
        own = {**self.averages(trained, site), WEIGHT: np.array(float(site.examples))}
        return {f"{DEVICE}{site.device}/{name}": np.asarray(array, np.float64) for name, array in own.items()}

    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        return {**shared, **means(sums)}

    @cached_property
    def stock(self) -> Stock | None:
        """Flower's strategy in the place of the mean, if one is named."""
        section = self.experiment.strategy
        return Stock(section) if section.aggregate != "mean" else None

    def check(self) -> None:
        if self.experiment.strategy.aggregate != "mean":
            Stock(self.experiment.strategy)  # which refuses what it cannot take

    @property
    def mu(self) -> float:
        return self.stock.mu if self.stock else 0.0

    def group_after(self, seed: int, round: int, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        if self.stock is None:
            return super().group_after(seed, round, shared, sums)
        return self.stock.after(seed, round, shared, sums)


def in_group(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a group, without its name."""
    begin = f"{group}/"
    return {name.removeprefix(begin): array for name, array in arrays.items() if name.startswith(begin)}


def weighed(arrays: Arrays, weight: float) -> dict[str, np.ndarray]:
    """Arrays as terms of a weighted sum, with the weight itself."""
    terms = {SUM + name: weight * np.asarray(array, np.float64) for name, array in arrays.items()}
    return {**terms, SUM + WEIGHT: np.array(float(weight))}


def means(sums: Arrays) -> dict[str, np.ndarray]:
    """Sums, divided by their weight."""
    return {name: array / sums[WEIGHT] for name, array in sums.items() if not name.startswith((WEIGHT, STACK))}


def stacked(block: str, factors: Factors, weight: float) -> dict[str, np.ndarray]:
    """Factors as ranks to be stacked, B times `weight`: the product of a stack is the weighted sum of products."""
    found = {}
    for target, (A, B) in factors.items():
        found[f"{STACK}{block}/A/{target}"] = np.asarray(A, np.float64)
        found[f"{STACK}{block}/B/{target}"] = weight * np.asarray(B, np.float64).T
    return found


def mean_product(sums: Arrays, block: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Factors of the mean of products that were stacked, compact: exact."""
    A, B = (side_of(sums, STACK + block, side) for side in "AB")
    return {target: compact(A[target], B[target].T / sums[WEIGHT]) for target in A}


def compacted(arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns partial results with stacks of at most as many ranks as a product needs: so a host's message stays
    bounded.
    """
    found = dict(arrays)
    for name in arrays:
        if f"{STACK}" in name and "/A/" in name:
            other = name.replace("/A/", "/B/")
            A, B = compact(arrays[name], arrays[other].T)
            found[name], found[other] = A, B.T
    return found


def same_shape(mine: Factors, theirs: Factors) -> None:
    """Raises UserError unless what came down fits what a device has, ranks included."""
    if not theirs:
        return
    check_targets(mine, theirs)
    if rank_of(mine) != rank_of(theirs):
        raise UserError(
            f"the shared adapter has rank {rank_of(theirs)} and the device's {rank_of(mine)}. Give all devices the "
            "same rank, or a strategy for several (hetlora, flexlora, flora)"
        )


def total(blocks: Sequence[Block]) -> Factors:
    """Returns the blocks as one adapter."""
    return beside([block.factors for block in blocks])
