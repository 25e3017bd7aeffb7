"""Flower strategies: who takes part, what is shared, how it is aggregated."""

from untether.strategies.fleet import FETCH, LEARN, FleetStrategy

__all__ = ["FETCH", "LEARN", "FleetStrategy"]
