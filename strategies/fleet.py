"""What every strategy of a fleet has in common: one columnar message a host, however many devices it holds.

Flower's runtime slows down with the number of nodes, not of devices, so a node (host) carries a shard: device i lives
on partition i mod P. A message names devices by number; what they know never travels.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from untether.sim.rounds.flower_records import order_of, to_records
from untether.sim.rounds.messages import Order

FETCH = f"{MessageType.QUERY}.fetch"
"""Message type of the fetch pass: ask the cloud, filter what it wrote."""

LEARN = MessageType.TRAIN
"""Message type of the learn pass: train, answer, score."""


class FleetStrategy(Strategy):
    """Base of the strategies: sends a round's plan to the hosts and sums what comes back.

    `hosts` maps a partition to its Flower node id; node ids are random, so nothing else may depend on them.
    """

    def __init__(self) -> None:
        self.hosts: dict[int, int] = {}

    def messages(self, message_type: str, order: Order) -> list[Message]:
        """One message a host that the order concerns."""
        partitions = sorted(self.hosts)
        return [
            Message(to_records(own), dst_node_id=self.hosts[partitions[host]], message_type=message_type)
            for host, own in order.split(len(partitions)).items()
        ]

    def configure_fetch(self, server_round: int, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Who asks the cloud in this round."""
        return self.messages(FETCH, order_of(config))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Who trains and answers in this round, with what is shared."""
        shared = {name: array.numpy() for name, array in arrays.items()}
        return self.messages(LEARN, order_of(config, shared))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sums the counts that the hosts report."""
        totals: dict[str, float] = {}
        for reply in replies:
            for name, value in reply.content["totals"].items():
                totals[name] = totals.get(name, 0) + value  # type: ignore[operator]
        return None, MetricRecord(totals)

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
