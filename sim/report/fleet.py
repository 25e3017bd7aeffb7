"""What the fleet did, counted from its tables: attempts, answers, and what left a device."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True, slots=True)
class Activity:
    """All events of one kind and outcome. Sums; `median_s` of the durations that were recorded."""

    kind: str
    outcome: str
    n: int
    median_s: float | None
    bytes_up: int
    bytes_down: int
    tokens_in: int
    tokens_out: int
    energy_j: float | None


@dataclass(frozen=True, slots=True)
class Uploads:
    """What devices showed the cloud for one kind of request. `chars_median` and `chars_max` are of a device's total."""

    kind: str
    devices: int
    requests: int
    items: int
    distinct_items: int
    chars: int
    tokens: int
    masked: int
    chars_median: float
    chars_max: int


class FleetSummary:
    """Events by kind and outcome, answers that did not come, and the ledger's totals.

    The token and byte totals are those of requests to the cloud; tokens that a device trained on are not among them.
    """

    def __init__(self, events: pd.DataFrame, ledger: pd.DataFrame, predictions: pd.DataFrame):
        self.activities: list[Activity] = _activities(events)
        self.uploads: list[Uploads] = _uploads(ledger, events)
        self.failures: list[tuple[str, str, int]] = _failures(predictions)
        asked = events[events["request_id"].notna()]
        self.tokens_in, self.tokens_out, self.bytes_up, self.bytes_down = (
            int(asked[name].fillna(0).sum()) for name in ("tokens_in", "tokens_out", "bytes_up", "bytes_down")
        )
        self.chars = sum(upload.chars for upload in self.uploads)
        self.items = sum(upload.items for upload in self.uploads)
        self.has_energy = any(activity.energy_j for activity in self.activities)


def _activities(events: pd.DataFrame) -> list[Activity]:
    if not len(events):
        return []
    groups = events.groupby(["kind", "outcome"], dropna=False)  # column by column: a group's rows may be gigabytes
    table = groups[["bytes_up", "bytes_down", "tokens_in", "tokens_out"]].sum().fillna(0).astype(int)
    table.insert(0, "n", groups.size())
    table.insert(1, "median_s", groups["duration_s"].median())
    table["energy_j"] = groups["energy_j"].sum(min_count=1)
    found = [
        Activity(_text(kind), _text(outcome), int(n), _number(median_s), *map(int, sums), _number(energy_j))
        for (kind, outcome), n, median_s, *sums, energy_j in table.itertuples(name=None)
    ]
    return sorted(found, key=lambda activity: (activity.kind, activity.outcome != "ok", -activity.n))


def _uploads(ledger: pd.DataFrame, events: pd.DataFrame) -> list[Uploads]:
    if not len(ledger):
        return []
    asked = events.dropna(subset=["request_id"]).drop_duplicates(["seed", "request_id"])
    asked = asked[["seed", "request_id", "kind"]].rename(columns={"kind": "request_kind"})
    found = []
    for kind, rows in ledger.merge(asked, on=["seed", "request_id"], how="left").groupby("request_kind", dropna=False):
        chars = rows.groupby(["seed", "device_id"])["chars"].sum()
        found.append(Uploads(
            _text(kind), len(chars), rows[["seed", "request_id"]].drop_duplicates().shape[0], len(rows),
            rows[["seed", "device_id", "item_id"]].drop_duplicates().shape[0], int(rows["chars"].sum()),
            int(rows["tokens"].fillna(0).sum()), int(rows["masked"].fillna(0).sum()), float(chars.median()),
            int(chars.max()),
        ))  # fmt: skip
    return found


def _failures(predictions: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Answers whose outcome is not `ok`, as (arm, outcome, count)."""
    if not len(predictions):
        return []
    failed = predictions[predictions["outcome"].notna() & (predictions["outcome"] != "ok")]
    counts = failed.groupby(["arm", "outcome"]).size()
    return [(str(arm), str(outcome), int(count)) for (arm, outcome), count in counts.items()]


def _number(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _text(value: object) -> str:
    return "\N{EN DASH}" if value is None or pd.isna(value) else str(value)
