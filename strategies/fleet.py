"""What every strategy of a fleet has in common: one columnar message a host, however many devices it holds.

Flower's runtime slows down with the number of nodes, not of devices, so a node (host) carries a shard: device i lives
on partition i mod P. A message names devices by number; what they know never travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from untether.sim.core.kinds import STRATEGIES
from untether.sim.experiment import Experiment
from untether.sim.rounds.flower_records import order_of_columns, reply_from, to_records
from untether.sim.rounds.messages import Order, Reply, joined

Arrays = Mapping[str, np.ndarray]
"""What is shared, by name."""


class FleetStrategy(Strategy):
    """Base of the strategies: sends a round's orders to the hosts and sums what comes back. Shares nothing.

    `hosts` maps a partition to its Flower node id; node ids are random, so nothing else may depend on them.
    `experiment` is the run's, set by `open_strategy`.
    """

    experiment: Experiment

    def __init__(self) -> None:
        self.hosts: dict[int, int] = {}

    # --- the round loop's side ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises UserError where the experiment wants of it what it cannot do."""

    def sides(self, round: int) -> str:
        """Returns which sides of an adapter, A and B, a device uploads in a round: none."""
        return ""

    def aggregate(self, seed: int, round: int, shared: Arrays, replies: Sequence[Reply]) -> dict[str, np.ndarray]:
        """Returns what is shared after a round.

        Args:
            seed: Of the fleet; all that is drawn comes from (seed, round).
            round: The round, from 0.
            shared: What was shared before it.
            replies: Of the hosts, or one that joins them. Devices that failed, with their worker or their host, are
                `lost` and in no array.

        Returns:
            The arrays, `shared` itself where nobody took part.
        """
        return dict(shared)

    # --- Flower's side --------------------------------------------------------------------------------------------

    def messages(self, message_type: str, order: Order) -> list[Message]:
        """Returns one message a host that the order concerns."""
        partitions = sorted(self.hosts)
        return [
            Message(to_records(own), dst_node_id=self.hosts[partitions[host]], message_type=message_type)
            for host, own in order.split(len(partitions)).items()
        ]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns an order that trains (`config`, as `sim.rounds.flower_records` writes it), with what is shared."""
        shared = {name: array.numpy() for name, array in arrays.items()}
        return self.messages(MessageType.TRAIN, order_of_columns(config, shared))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns what the hosts' replies come to: the arrays of `aggregate`, of a fleet that has shared nothing yet,
        and the sums of their counts.
        """
        found = [reply_from(message.content) for message in replies if not message.has_error()]
        arrays = self.aggregate(0, server_round, {}, found)
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()}) if arrays else None
        return record, MetricRecord(joined(found).counts())

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: a device answers its queries in the learn pass, on the model that is resident then."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Nothing to print: the run directory holds the experiment."""


def open_strategy(experiment: Experiment) -> FleetStrategy:
    """Returns the strategy that an experiment names.

    Raises:
        UserError: The strategy cannot do what the experiment wants of it.
    """
    strategy = STRATEGIES.bind(experiment.strategy.name, experiment.settings)()
    strategy.experiment = experiment
    strategy.check()
    return strategy
