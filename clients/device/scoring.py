"""Rows of the tables: predictions and their scores, the same for every arm, whoever answered; and training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from untether.clients.device.device import Device
from untether.sim.core.clock import DAY_S
from untether.sim.core.records import Query
from untether.sim.evaluation.metrics import score
from untether.sim.population.source import device_id
from untether.sim.population.tasks import get_task
from untether.sim.rounds.messages import Order, Version

if TYPE_CHECKING:
    from untether.clients.engine.training import TrainResult

LOSSES_KEPT = 16
"""Rows of `training` an adapter and round: the first step, the last and some between."""

WORST_RATING = 4.0
"""The largest error between two ratings of 1 to 5 stars."""


def prediction_row(device: Device, query: Query, arm: str, answered_by: str) -> dict[str, Any]:
    """Returns a row of `predictions` before it is answered. `answered_by`: the arm's `answers` (see `Answering`)."""
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


def training_rows(results: Mapping[Version, TrainResult]) -> list[dict[str, Any]]:
    """Returns rows of `training`: of each adapter at most `LOSSES_KEPT` steps."""
    rows = []
    for version, result in results.items():
        stride = max(1, -(-result.steps // (LOSSES_KEPT - 1)))
        for step in sorted({*range(0, result.steps, stride), result.steps - 1} if result.steps else ()):
            rows.append({
                "device_id": device_id(version.device), "arm": version.arm, "step": step, "loss": result.losses[step],
                "lr": result.learning_rates[step], "tokens": result.tokens_by_step[step],
            })  # fmt: skip
    return rows


def train_event_rows(order: Order, results: Mapping[Version, TrainResult]) -> list[dict[str, Any]]:
    """Returns rows of `events` of kind `train`: what was really done."""
    return [
        {
            "time_s": order.round * DAY_S, "attempt": 0, "device_id": device_id(version.device), "arm": version.arm,
            "event_id": f"train-s{order.seed}-r{order.round}-{device_id(version.device)}-{version.arm}-{version.on}",
            "kind": "train", "outcome": result.outcome,
            "tokens_in": result.tokens, "steps": result.steps, "detail": f"{result.steps} steps",
        }
        for version, result in results.items()
    ]  # fmt: skip
