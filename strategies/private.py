"""`private`: every device trains for itself and nothing is shared. The collaboration is with the cloud alone."""

from __future__ import annotations

from strategies.fleet import FleetStrategy, register


class Private(FleetStrategy):
    """CDCDA-PLM's own setting: adapters, histories and samples stay where they are; only counts come back."""


register("private", Private)
