"""Prediction rows and their scores: the same for every arm, whoever answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from untether.clients.device.device import Device
from untether.sim.core.records import Query
from untether.sim.evaluation.metrics import score
from untether.sim.population.tasks import get_task

WORST_RATING = 4.0
"""The largest error between two ratings of 1 to 5 stars."""


def prediction_row(device: Device, query: Query, arm: str, answered_by: str) -> dict[str, Any]:
    """Returns a row of `predictions` before it is answered. `answered_by`: base, adapter, shared, majority or cloud."""
    return {
        "device_id": device.device_id, "user_id": device.user.user_id,
        "cluster": device.user.cluster or device.user.user_id, "arm": arm, "task": query.task,
        "query_id": query.query_id, "query_time_s": query.time_s, "input": query.input, "gold": query.gold,
        "prediction": "", "outcome": "ok", "answered_by": answered_by,
    }  # fmt: skip


def answered(row: dict[str, Any], prediction: str, outcome: str = "ok") -> dict[str, Any]:
    """Fills in the answer and its score on the task's primary metric, and returns the row."""
    value = score(row["task"], prediction, row["gold"])[get_task(row["task"]).primary]
    row.update(prediction=prediction, outcome=outcome, score=value)
    return row


def error(task: str, score: float) -> float:
    """Returns how wrong an answer with this score is, from 0 (right) to 1 (entirely wrong): one scale for all tasks."""
    spec = get_task(task)
    if spec.kind == "rating":
        return min(1.0, score / WORST_RATING)
    return 1.0 - score if spec.higher_is_better else score


def metric_rows(predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows of `metrics` from answered prediction rows: each query-level metric as a mean over a user's queries.
    """
    values: dict[tuple[str, str, str, str, str], list[float]] = defaultdict(list)
    for row in predictions:
        for metric, value in score(row["task"], row["prediction"], row["gold"]).items():
            values[row["device_id"], row["user_id"], row["arm"], row["task"], metric].append(value)
    names = ("device_id", "user_id", "arm", "task", "metric")
    return [
        {**dict(zip(names, key, strict=True)), "value": sum(found) / len(found), "n": len(found)}
        for key, found in values.items()
    ]
