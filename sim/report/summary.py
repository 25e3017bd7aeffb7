"""One reading of summary.json for everything that people look at: order, direction, rounding and the verdict in words.

The terminal, the report, the figures and the tables all ask this module, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from untether.sim.core.errors import UserError
from untether.sim.experiment.arms import CONTRASTS, PRIMARY, ordered
from untether.sim.population.tasks import get_task, higher_is_better, unit

SIGNIFICANT = 0.05
#: An interval that ends at zero but for floating-point rounding does not lie beside it.
_ROUNDING = 1e-9

METRIC_NAMES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "mae": "MAE", "rmse": "RMSE", "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contrast:
    """One comparison on one task and metric. `gain` and its interval are `diff` turned so that more is better."""

    task: str
    metric: str
    arm: str
    reference: str
    diff: float | None
    diff_ci_low: float | None
    diff_ci_high: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    wins: int | None
    ties: int | None
    losses: int | None
    p: float | None
    p_holm: float | None
    margin: float | None
    n_users: int | None
    n_queries: int | None

    @property
    def name(self) -> str:
        return f"{self.arm} \N{MINUS SIGN} {self.reference}"

    @property
    def is_primary(self) -> bool:
        return (self.arm, self.reference) in PRIMARY

    @property
    def significant(self) -> bool:
        """Whether the difference stands after Holm's correction."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT

    @property
    def not_worse(self) -> bool:
        """Whether the interval lies above -`margin`; no where the comparison has no margin."""
        return self.margin is not None and self.gain_low is not None and self.gain_low > -self.margin

    def verdict(self) -> str:
        """Returns the comparison's outcome in a few words, the same ones everywhere.

        Primary contrasts are judged by Holm's p; the one that has a margin (against the cloud, on the primary metric)
        by its interval against -`margin`.
        """
        if self.gain is None or self.gain_low is None or self.gain_high is None:
            return "cannot be told"
        better, worse = self.gain_low > _ROUNDING, self.gain_high < -_ROUNDING
        if self.margin is not None:
            if better:
                return "better"
            if self.not_worse:
                return f"not worse (margin {amount(self.margin, self.metric)})"
            return "worse" if worse else "undecided"
        if self.is_primary and self.significant:
            return "better" if self.gain > 0 else "worse"
        if better or worse:
            return ("better" if better else "worse") + (", not after Holm" if self.is_primary else " (uncorrected)")
        return "no difference shown"


class Summary:
    """The rows and facts of one run. Missing facts read as empty; a missing row reads as None."""

    def __init__(self, content: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None):
        rows = content.get("rows", []) if isinstance(content, Mapping) else (content or [])
        self.rows: list[dict[str, Any]] = [{key: _finite(value) for key, value in row.items()} for row in rows]
        self.facts: dict[str, Any] = dict(content.get("facts") or {}) if isinstance(content, Mapping) else {}
        self.tasks: list[str] = sorted({row["task"] for row in self.rows}, key=_natural)
        self.arms: list[str] = ordered(row["arm"] for row in self.rows)
        self._means = {(r["task"], r["arm"], r["metric"]): r for r in self.rows if not r.get("reference")}

    def mean(self, task: str, arm: str, metric: str | None = None) -> dict[str, Any] | None:
        """Returns the row of an arm's own mean on a task's metric (none given: the primary one), or None."""
        return self._means.get((task, arm, metric or self.primary(task)))

    def effort(self, arm: str) -> dict[str, float | None]:
        """Returns optimizer steps and trained tokens of a device with this arm, on average over devices."""
        row = next((row for row in self.rows if row["arm"] == arm), {})
        return {"steps": row.get("steps"), "tokens": row.get("tokens")}

    def metrics(self, task: str) -> list[str]:
        """Returns the metrics reported for a task, the primary one first."""
        seen = list(dict.fromkeys(row["metric"] for row in self.rows if row["task"] == task))
        return sorted(seen, key=lambda metric: metric != self.primary(task))

    def primary(self, task: str) -> str:
        """Returns the metric that tests of this task are made on; for a task nobody registered, the first one reported.
        """
        try:
            return get_task(task).primary
        except UserError:
            return next((row["metric"] for row in self.rows if row["task"] == task), "")

    def best(self, task: str) -> float | None:
        """Returns the best mean any arm reached on the task's primary metric."""
        means = [row["mean"] for arm in self.arms if (row := self.mean(task, arm)) and row.get("mean") is not None]
        if not means:
            return None
        return max(means) if higher_is_better(self.primary(task)) else min(means)

    def margins(self) -> list[str]:
        """Returns the margins that comparisons were judged against, each once, with their units."""
        return list(dict.fromkeys(amount(c.margin, c.metric) for c in self.contrasts() if c.margin is not None))

    def clusters(self, task: str) -> int | None:
        """Returns how many clusters the users of `users` fall into."""
        found = [row["n_clusters"] for row in self.rows if row["task"] == task and row.get("n_clusters")]
        return max(found, default=None)

    def users(self, task: str) -> int | None:
        """Returns how many users the task's arms were compared on (the most of any arm)."""
        return max((row["n_users"] for row in self.rows if row["task"] == task and row.get("n_users")), default=None)

    def contrasts(self, *, everything: bool = False) -> list[Contrast]:
        """Returns the design's contrasts on the tasks' primary metrics, in its order, by task; `everything`: all there
        are.
        """
        order = {pair: index for index, pair in enumerate(CONTRASTS)}
        found = []
        for row in self.rows:
            designed = (row["arm"], row.get("reference")) in order and row["metric"] == self.primary(row["task"])
            if row.get("reference") and (everything or designed):
                found.append(_contrast(row))

        def place(contrast: Contrast) -> tuple[Any, ...]:
            metric = self.metrics(contrast.task).index(contrast.metric)
            pair = order.get((contrast.arm, contrast.reference), len(order))
            return pair, contrast.name, _natural(contrast.task), metric

        return sorted(found, key=place)


def _contrast(row: Mapping[str, Any]) -> Contrast:
    diff, low, high = row.get("diff"), row.get("diff_ci_low"), row.get("diff_ci_high")
    turned = (diff, low, high)
    if not higher_is_better(row["metric"]):
        turned = tuple(None if value is None else -value for value in (diff, high, low))
    keys = ("wins", "ties", "losses", "p", "p_holm", "margin", "n_users", "n_queries")
    return Contrast(row["task"], row["metric"], row["arm"], row["reference"], diff, low, high, *turned,
                    *(row.get(key) for key in keys))  # fmt: skip


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _natural(task: str) -> tuple[Any, ...]:
    head, _, tail = task.rpartition("_")
    digits = "".join(character for character in tail if character.isdigit())
    return (head or tail, int(digits) if digits else 0, tail)


def title(task: str) -> str:
    """Returns a task's full name, or "" for one that nobody registered."""
    try:
        return get_task(task).title
    except UserError:
        return ""


def arrow(metric: str, ascii_only: bool = False) -> str:
    """Returns which way is better."""
    if ascii_only:
        return "(up)" if higher_is_better(metric) else "(down)"
    return "\N{UPWARDS ARROW}" if higher_is_better(metric) else "\N{DOWNWARDS ARROW}"


def metric_name(metric: str) -> str:
    """Returns a metric as papers print it."""
    return METRIC_NAMES.get(metric, metric)


def amount(value: float, metric: str) -> str:
    """Returns a margin with the unit of its metric: "0.02", "0.1 stars"."""
    return f"{value:g} {unit(metric)}".rstrip()


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """Returns a number as people read it: fixed digits, a true minus sign, an en dash for none."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None, digits: int = 3, signed: bool = False) -> str:
    """Returns a confidence interval in brackets, or "" where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, digits, signed)}, {number(high, digits, signed)}]"


def p_value(p: float | None) -> str:
    """Returns a p-value with three digits, and no false zero."""
    if p is None:
        return "\N{EN DASH}"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
