"""What the tables hold for a device that killed its worker: every answer it owed, empty, so that arms stay paired, and
what it uploaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from untether.clients.device.device import Device, Shard
from untether.clients.device.ledger import ledger_rows
from untether.clients.device.scoring import answered, metric_rows, prediction_row
from untether.sim.experiment import Experiment
from untether.sim.population.source import open_population
from untether.sim.population.tasks import get_task


def lost_rows(
    experiment: Experiment, order: Mapping[str, Any], lost: Mapping[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """Predictions, metrics and uploads of devices that the learn pass could not finish; `lost` maps device to outcome.

    Each answer is empty, scored as such, and carries the outcome (`crashed`, `out_of_memory`).
    """
    shard = Shard(order["seed"], order["round"], tuple(sorted(lost)))
    population = open_population(experiment, shard.seed)
    devices = [Device(index, population.user(index)) for index in shard.devices]
    rows = [
        answered(row, "", lost[device.index])
        for device in devices
        for row in _owed(device, shard.round, experiment.arms)
    ]
    uploads = ledger_rows(experiment, shard, devices, order)
    return {"predictions": rows, "metrics": metric_rows(rows), "ledger": uploads}


def _owed(device: Device, round: int, arms: Sequence[str]) -> Iterator[dict[str, Any]]:
    for query in device.queries(round):
        for arm in arms:
            if not (arm == "majority" and get_task(query.task).kind == "generation"):
                yield prediction_row(device, query, arm, answered_by="nobody")
