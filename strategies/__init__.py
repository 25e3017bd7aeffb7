"""Flower strategies: who takes part, what is shared, how it is aggregated."""

from untether.strategies.fleet import FleetStrategy, open_strategy

__all__ = ["FleetStrategy", "open_strategy"]
