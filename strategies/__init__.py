"""Flower strategies: who takes part, what is shared, how it is aggregated."""

import strategies.private  # noqa: F401  (registers itself)
from strategies.fleet import FETCH, LEARN, FleetStrategy, make_strategy, register

__all__ = ["FETCH", "LEARN", "FleetStrategy", "make_strategy", "register"]
