"""Device: one user's simulated device."""

from __future__ import annotations

from dataclasses import dataclass

from untether.sim.core.records import Interaction, Query, User
from untether.sim.experiment import Experiment
from untether.sim.population.order import asked, known_history
from untether.sim.population.source import device_id


@dataclass(frozen=True, slots=True)
class Device:
    """One user's simulated device: its number in the fleet and whose it is."""

    index: int
    user: User

    @property
    def device_id(self) -> str:
        """The device's name in every table."""
        return device_id(self.index)

    def real_items(self, experiment: Experiment, round: int) -> tuple[Interaction, ...]:
        """Returns the items that the device has in a round: it may train on, retrieve and show them to the cloud."""
        most = experiment.population.max_history
        return tuple(item for task in self.user.tasks for item in known_history(self.user, task, round, most))

    def queries(self, round: int) -> tuple[Query, ...]:
        """Returns the queries that its user asks in a round."""
        return asked(self.user, round)

    def held_out(self, round: int) -> tuple[Query, ...]:
        """Returns the queries of a round and of all later ones: no training data of the device may hold them."""
        return tuple(query for query in self.user.queries if query.round is None or query.round >= round)
