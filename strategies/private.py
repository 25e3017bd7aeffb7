"""`private`: every device trains for itself and nothing is shared. The collaboration is with the cloud alone."""

from __future__ import annotations

from untether.strategies.fleet import FleetStrategy


class Private(FleetStrategy):
    """CDCDA-PLM's own setting: adapters, histories and samples stay where they are; only counts come back."""
