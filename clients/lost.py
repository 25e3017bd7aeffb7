"""What the tables hold for a device that killed its worker: every answer it owed, empty, so that arms stay paired."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from clients.device import Device
from clients.scoring import answered, metric_rows, prediction_row
from sim.experiment import Experiment
from sim.population.source import open_population
from sim.population.tasks import get_task


def lost_rows(experiment: Experiment, seed: int, round: int, lost: dict[int, str]) -> dict[str, list[dict[str, Any]]]:
    """Predictions and metrics of devices that the learn pass could not finish; `lost` maps device to outcome.

    Each answer is empty, scored as such, and carries the outcome (`crashed`, `out_of_memory`).
    """
    population = open_population(experiment, seed)
    rows = [
        answered(row, "", outcome)
        for index, outcome in sorted(lost.items())
        for row in _owed(Device(index, population.user(index)), round, experiment.arms)
    ]
    return {"predictions": rows, "metrics": metric_rows(rows)}


def _owed(device: Device, round: int, arms: Sequence[str]) -> Iterator[dict[str, Any]]:
    for query in device.queries(round):
        for arm in arms:
            if not (arm == "majority" and get_task(query.task).kind == "generation"):
                yield prediction_row(device, query, arm, answered_by="nobody")
