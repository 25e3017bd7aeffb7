"""Flower strategies: who takes part, what is shared, how it is aggregated."""

from collections.abc import Callable

from untether.sim.core.registry import Registry
from untether.strategies.fleet import FETCH, LEARN, FleetStrategy

STRATEGIES: Registry[Callable[[], FleetStrategy]] = Registry(
    "strategy", "strategy.name", {"private": "untether.strategies.private:Private"}
)

__all__ = ["FETCH", "LEARN", "STRATEGIES", "FleetStrategy"]
