"""Device: one user's simulated device, and a shard of them."""

from __future__ import annotations

from dataclasses import dataclass

from sim.experiment import Experiment
from sim.population.order import one_shot_history
from sim.population.source import device_id
from sim.records import Interaction, User


@dataclass(frozen=True, slots=True)
class Device:
    """One user's simulated device: its number in the fleet and whose it is."""

    index: int
    user: User

    @property
    def device_id(self) -> str:
        """The device's name in every table."""
        return device_id(self.index)

    def real_items(self, experiment: Experiment) -> tuple[Interaction, ...]:
        """What the device may train on, retrieve and show to the cloud: per task, what its first query may see."""
        most = experiment.population.max_history
        return tuple(item for task in self.user.tasks for item in one_shot_history(self.user, task, most))


@dataclass(frozen=True, slots=True)
class Shard:
    """Devices that a worker handles in one call, of one seed and round. `name` names the parts it writes."""

    seed: int
    round: int
    devices: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique among the shards of a pass, however they are split."""
        return f"{device_id(self.devices[0])}-{device_id(self.devices[-1])}-{len(self.devices)}"
