"""The rows of a device that killed its worker: empty answers to all of its queries, so that arms stay paired, and its
uploads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from untether.clients.device.device import Device
from untether.clients.device.ledger import ledger_rows
from untether.clients.device.scoring import answered, metric_rows, prediction_row
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ARMS
from untether.sim.population.source import open_population
from untether.sim.population.tasks import get_task
from untether.sim.rounds.messages import Learn


def lost_rows(
    experiment: Experiment, order: Learn, lost: Mapping[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """Returns predictions, metrics and uploads of the order's devices that the learn pass could not finish.

    Each answer is empty, scored as such, and carries the outcome (`crashed`, `out_of_memory`).

    Args:
        experiment: The run's experiment.
        order: The order.
        lost: Outcome by device.
    """
    population = open_population(experiment, order.seed)
    devices = [Device(index, population.user(index)) for index in order.devices]
    rows = [
        answered(row, "", lost[device.index])
        for device in devices
        for row in _owed(device, order.round, experiment.arms)
    ]
    uploads = ledger_rows(experiment, devices, order)
    return {"predictions": rows, "metrics": metric_rows(rows), "ledger": uploads}


def _owed(device: Device, round: int, arms: Sequence[str]) -> Iterator[dict[str, Any]]:
    for query in device.queries(round):
        for arm in arms:
            if ARMS[arm].answers_kind(get_task(query.task).kind):
                yield prediction_row(device, query, arm, answered_by="nobody")
