"""What became of the synthetic samples: asked for, received, rejected by which filter, accepted; and, where the world
knows the truth, how well each filter tells a faulty sample from a sound one.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import records

#: What the world's generator calls a sample without a fault in the `truth` column.
SOUND = "good"
_REJECTED = "rejected_by:"


class Funnel:
    """Counts of samples by task and fate. Fates in order: accepted, one a filter, not received."""

    def __init__(self, samples: pd.DataFrame, predictions: pd.DataFrame, experiment: Experiment,
                 asked: dict[str, int] | None = None):  # fmt: skip
        self._counts = samples.groupby(["task", "verdict"]).size() if len(samples) else pd.Series(dtype=int)
        self._asked = _asked(samples, predictions, experiment)
        self._asked.update({task: int(count) for task, count in (asked or {}).items()})
        self.tasks: list[str] = sorted({*self._asked, *(samples["task"].unique() if len(samples) else ())})
        verdicts = set(samples["verdict"].dropna()) if len(samples) else set()
        named = [name for name in experiment.filters.order if f"{_REJECTED}{name}" in verdicts]
        others = sorted(v.removeprefix(_REJECTED) for v in verdicts if v.startswith(_REJECTED))
        self.filters: list[str] = named + [name for name in others if name not in named]
        self.fates: list[str] = ["accepted", *self.filters, "not received"]

    def asked(self, task: str) -> int:
        """Returns how many samples were asked for; never fewer than were received."""
        return max(self._asked.get(task, 0), self.received(task))

    def received(self, task: str) -> int:
        """Returns how many well-formed samples the cloud's answers held."""
        return sum(self._of(task, verdict) for verdict in ("accepted", *(_REJECTED + name for name in self.filters)))

    def count(self, task: str, fate: str) -> int:
        """Returns how many of a task's samples met a fate: `accepted`, a filter's name, or `not received`."""
        if fate == "not received":
            return self.asked(task) - self.received(task)
        return self._of(task, fate if fate == "accepted" else _REJECTED + fate)

    def _of(self, task: str, verdict: str) -> int:
        return int(self._counts.get((task, verdict), 0))


def _asked(samples: pd.DataFrame, predictions: pd.DataFrame, experiment: Experiment) -> dict[str, int]:
    """`cloud.samples` for every user and task of every round that asked: those with samples; of one round, all."""
    keys = ["seed", "round", "user_id", "task"]
    everyone = experiment.rounds == 1 and any(arm.needs_samples for arm in records(experiment.arms))
    frames = [frame[keys] for frame in (samples, predictions if everyone else predictions[:0]) if len(frame)]
    if not frames:
        return {}
    users = pd.concat(frames).drop_duplicates().groupby("task").size()
    return {str(task): int(count) * experiment.cloud.samples for task, count in users.items()}


@dataclass(frozen=True, slots=True)
class FaultRow:
    """How samples of one true kind fared: `rejected` by filter; `caught` by any (for a fault: recall)."""

    kind: str
    n: int
    sound: bool
    rejected: dict[str, int]
    caught: float


def faults(samples: pd.DataFrame, filters: list[str]) -> list[FaultRow]:
    """Returns one row a true kind of sample, sound ones first; empty where nobody knows the truth."""
    if not len(samples) or samples["truth"].isna().all():
        return []
    rows = []
    for kind, group in samples.dropna(subset=["truth"]).groupby("truth"):
        rejected = {name: int((group["verdict"] == _REJECTED + name).sum()) for name in filters}
        caught = sum(rejected.values()) / len(group)
        rows.append(FaultRow(str(kind), len(group), kind == SOUND, rejected, caught))
    return sorted(rows, key=lambda row: (not row.sound, row.kind))


def precision(rows: list[FaultRow], name: str) -> float | None:
    """Returns of the samples that a filter rejected (or all of them, for ""), the share that really was faulty."""

    def of(row: FaultRow) -> int:
        return sum(row.rejected.values()) if not name else row.rejected.get(name, 0)

    total = sum(of(row) for row in rows)
    return sum(of(row) for row in rows if not row.sound) / total if total else None
