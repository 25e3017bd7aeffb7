"""The sentences of the study `scale`, made from its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from untether.sim.population.tasks import get_task
from untether.sim.report.summary import metric_name


def exponent(cells: pd.DataFrame, name: str) -> tuple[float, float]:
    """Fits `name = factor x devices ^ exponent` by least squares on logarithms, over cold cells: (exponent, factor)."""
    own = cells[cells["cold"] & _all_learn(cells) & cells[name].notna() & (cells[name] > 0)]
    if own["devices"].nunique() < 2:
        return np.nan, np.nan
    slope, intercept = np.polyfit(np.log(own["devices"]), np.log(own[name]), 1)
    return float(slope), float(np.exp(intercept))


def findings(cells: pd.DataFrame, quality: pd.DataFrame) -> list[str]:
    """Returns the findings: what the simulation takes, the cloud's service, and which users gain."""
    return [*_simulation(cells), *_service(cells), *_quality(quality)]


def notes(cells: pd.DataFrame) -> list[str]:
    """Returns the notes on what the numbers mean."""
    return [
        "Seconds and memory of the simulation are this machine's (`environment.json` in each cell), read from the "
        "first cell of each size, all processes together. Waiting, throughput and money are in virtual time, from the "
        "timeline of links, hardware and cloud; a simulation that runs slower or faster gives the same ones. Workers "
        "fill a memory budget (`engine.memory_gib`; a share of what is free unless set), so memory grows up to that."
    ]


def _all_learn(cells: pd.DataFrame) -> pd.Series:
    return cells["learners"] == cells["devices"]


def _simulation(cells: pd.DataFrame) -> Iterator[str]:
    cold = cells[cells["cold"]].sort_values("devices")
    for _, row in cold[~_all_learn(cold)].iterrows():
        yield (
            f"Of {_count(row.devices)} devices {_count(row.learners)} learned, in {row.wall_s:.0f} s and "
            f"{row.peak_memory_gib:.1f} GiB. The others asked, waited, paid and trained in virtual time. Extrapolated "
            "from those that learned: how long their answers were and how many samples they kept. Nothing is said of "
            "how well they answer."
        )
    cold = cold[_all_learn(cold)]
    if len(cold) < 2 or cold["wall_s"].isna().any():
        return
    first, last = cold.iloc[0], cold.iloc[-1]
    extra = (last["wall_s"] - first["wall_s"]) / (last["devices"] - first["devices"])
    fixed = first["wall_s"] - extra * first["devices"]
    yield (
        f"Simulating {_count(first.devices)} devices took {first.wall_s:.0f} s, {_count(last.devices)} took "
        f"{last.wall_s:.0f} s: {fixed:.0f} s whatever the fleet, and {extra:.2f} s a device. Processor time grows as "
        f"devices to the power of {exponent(cells, 'cpu_s')[0]:.2f}, peak memory to the power of "
        f"{exponent(cells, 'peak_memory_gib')[0]:.2f} ({first.peak_memory_gib:.1f} to {last.peak_memory_gib:.1f} GiB)."
    )


def _service(cells: pd.DataFrame) -> Iterator[str]:
    for cloud, own in cells.groupby("cloud", sort=False):
        own = own.sort_values("devices")
        first, last = own.iloc[0], own.iloc[-1]
        waits = ""
        if np.isfinite(last["queued_p50_s"]) and last["queued_p99_s"] > 0:
            waits = (
                f" Of {_count(last.devices)} devices' attempts half wait {_span(last.queued_p50_s)} or more for a "
                f"place, one in twenty {_span(last.queued_p95_s)} or more."
            )
        if last["rate_limited_requests"] > 0:
            waits += f" {last.rate_limited_requests:.0%} of their requests are turned away at least once."
        yield (
            f"Cloud with {cloud}: nine in ten of {_count(first.devices)} devices have a personalized adapter after "
            f"{_hours(first.h_to_90)}, of {_count(last.devices)} after {_hours(last.h_to_90)}; "
            f"{last.answered:.1%} of the requests are answered, at most {last.busiest_answers_per_s:.2g} a second, for "
            f"{last.money / last.devices:.2g} dollars a device.{waits}"
        )


def _quality(quality: pd.DataFrame) -> Iterator[str]:
    for (task, arm), own in quality.groupby(["task", "arm"], sort=False):
        short, long = own.iloc[0], own.iloc[-1]
        yield (
            f"{task}, gain of {arm} over the frozen base ({metric_name(get_task(task).primary)}, above zero: better): "
            f"{_interval(short)} for users with {items(short)} items, {_interval(long)} with {items(long)}."
        )


def items(row: pd.Series) -> str:
    """Returns the lengths of history that a row is about: `3 to 4`, `16`."""
    return str(row.least) if row.least == row.most else f"{row.least} to {row.most}"


def _interval(row: pd.Series) -> str:
    return f"{row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}] ({row.users} users)"


def _count(devices: float) -> str:
    return f"{int(devices):,}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if np.isfinite(hours) else "more than the run"


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
