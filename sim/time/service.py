"""The service that a fleet got, from the rows of `events`: waiting, throughput, refusals, cost, waste, and the time
until devices had their first personalized adapter.

Every function takes the table as a frame (see docs/run-directory.md), whole or cut to a seed, a kind or some rounds,
and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from untether.sim.experiment.virtual_sections import CloudCapacity
from untether.sim.time.cloud_capacity import price

REQUESTS = ("augment", "answer")
"""Kinds of events that are attempts to ask the cloud."""

UNASKED = ("offline", "over_budget")
"""Outcomes of requests that were given up without an attempt."""

UNDELIVERED = (*UNASKED, "dropped", "timeout", "rate_limited", "server_error", "unreachable", "crashed")
"""Outcomes of attempts whose answer never reached the device. Any other answer did, whatever it was worth."""


def attempts(events: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of real attempts to reach the cloud."""
    return events[events.kind.isin(REQUESTS) & ~events.outcome.isin(UNASKED)]


def waiting_s(events: pd.DataFrame, quantiles: Sequence[float] = (0.5, 0.95, 0.99)) -> dict[float, float]:
    """Returns quantiles of the seconds that admitted requests waited for a place at the cloud; NaN without any.

    Those that left the queue for good count with the time they stayed in it.
    """
    waited = attempts(events).queued_s.dropna()
    return {q: float(waited.quantile(q)) if len(waited) else math.nan for q in quantiles}


def throughput_per_s(events: pd.DataFrame, bin_s: float = 3600.0) -> tuple[float, float]:
    """Returns the answers a second that reached their devices, a seed: (over all bins with a request, in the busiest).
    """
    tried = attempts(events)
    ended = (tried.time_s + tried.duration_s)[~tried.outcome.isin(UNDELIVERED)]
    if ended.empty:
        return 0.0, 0.0
    seeds = events.seed.nunique() if "seed" in events else 1
    begun, done = (tried.time_s // bin_s).astype(int), (ended // bin_s).astype(int)
    busy = len(set(begun) | set(done))
    return len(ended) / (busy * bin_s * seeds), int(done.value_counts().max()) / (bin_s * seeds)


def share_rate_limited(events: pd.DataFrame) -> tuple[float, float]:
    """Returns (share of attempts rejected as over the cloud's rate, share of requests with such an attempt)."""
    tried = attempts(events)
    if tried.empty:
        return 0.0, 0.0
    limited = tried.outcome == "rate_limited"
    names = ["seed", "request_id"] if "seed" in tried else ["request_id"]
    return float(limited.mean()), float(limited.groupby([tried[name] for name in names]).any().mean())


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens that the cloud's model read and wrote, those of lost answers included, and their price."""

    tokens_in: int
    tokens_out: int
    money: float


def cost(events: pd.DataFrame, capacity: CloudCapacity) -> Cost:
    """Returns the cloud's tokens and their price, by the experiment's prices."""
    tried = attempts(events)
    tokens_in, tokens_out = int(tried.tokens_in.sum()), int(tried.tokens_out.sum())
    return Cost(tokens_in, tokens_out, price(capacity, tokens_in, tokens_out))


DEVICE = ["seed", "device_id"]
"""What names a device in a table of several seeds."""

Z_95 = 1.959964


def wasted(events: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Returns bytes and energy a device, in all (`bytes`, `energy_j`) and wasted (`bytes_wasted`, `energy_wasted_j`).

    Wasted are attempts to get samples, and trainings of `arm`, that did not end `ok`.
    """
    rows = events[(events["kind"] == "augment") | ((events["kind"] == "train") & (events["arm"] == arm))]
    failed = rows["outcome"] != "ok"
    moved = rows["bytes_up"].fillna(0) + rows["bytes_down"].fillna(0)
    energy = rows["energy_j"].fillna(0.0)
    counted = rows[DEVICE].assign(
        bytes=moved, bytes_wasted=moved.where(failed, 0), energy_j=energy, energy_wasted_j=energy.where(failed, 0.0)
    )
    return counted.groupby(DEVICE).sum().reset_index()


def trainings(events: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Returns one arm's trained adapters, a row each: seed, device_id, round, `on` (a kind of data), `live_s`.

    `on` is real, samples or stale_samples.
    """
    rows = events[(events["kind"] == "train") & (events["arm"] == arm) & (events["outcome"] == "ok")]
    on = rows["detail"].astype("string").str.extract(r"^on (\w+)")[0]
    return rows[[*DEVICE, "round"]].assign(on=on, live_s=rows["time_s"] + rows["duration_s"]).reset_index(drop=True)


def first_live(made: pd.DataFrame, devices: pd.DataFrame, end_s: float) -> pd.DataFrame:
    """Returns when each device had the first of the adapters `made`: `time_s`, and `seen`.

    `seen` is false where that was not before `end_s` (`time_s` is then `end_s`: censored).

    Args:
        made: As `trainings` returns them.
        devices: Rows of seed and device_id.
        end_s: The end of observation.
    """
    first = made.groupby(DEVICE)["live_s"].min().rename("time_s").reset_index()
    found = devices[DEVICE].drop_duplicates().merge(first, how="left", on=DEVICE)
    seen = found["time_s"] < end_s
    return found.assign(time_s=found["time_s"].where(seen, end_s), seen=seen)


def survival(times_s: Sequence[float], seen: Sequence[bool]) -> pd.DataFrame:
    """Returns the survival curve of Kaplan and Meier (JASA 1958).

    A row an event time, with the share that is still without (`share`) right after it and the 95% interval `low`,
    `high` on the log-log scale from Greenwood's variance. Begins with time 0, share 1. Where an event and a censoring
    meet, the event comes first.

    Args:
        times_s: Of the event, or of the censoring.
        seen: Whether it is an event.
    """
    times, happened = np.asarray(times_s, dtype=float), np.asarray(seen, dtype=bool)
    rows, share, variance = [(0.0, 1.0, 1.0, 1.0)], 1.0, 0.0
    for time_s in np.unique(times[happened]):
        at_risk, ended = int((times >= time_s).sum()), int((happened & (times == time_s)).sum())
        share *= 1 - ended / at_risk
        if share == 0:
            rows.append((float(time_s), 0.0, 0.0, 0.0))
            break
        variance += ended / (at_risk * (at_risk - ended))
        spread = Z_95 * np.sqrt(variance) / np.log(share)
        rows.append((float(time_s), share, share ** np.exp(-spread), share ** np.exp(spread)))
    return pd.DataFrame(rows, columns=["time_s", "share", "low", "high"])


def reached_s(curve: pd.DataFrame, share: float) -> float:
    """Returns when that share has it, by a curve of `survival`; inf where that never comes."""
    there = curve[1 - curve["share"] >= share - 1e-12]
    return float(there["time_s"].iloc[0]) if len(there) else math.inf
