"""How a fleet was served, from the rows of `events`: waiting, throughput, refusals, cost, waste, and how long devices
waited for their first personalized adapter.

Every function takes the table as a frame (see docs/run-directory.md), whole or cut to a seed, a kind or some rounds,
and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sim.asking import Traffic
from sim.cloud_capacity import price
from sim.sections import CloudCapacity

REQUESTS = ("augment", "answer")
"""Kinds of events that are attempts to ask the cloud."""

UNASKED = ("offline", "over_budget")
"""Outcomes of requests that were given up without an attempt."""

UNDELIVERED = (*UNASKED, "dropped", "timeout", "rate_limited", "server_error", "unreachable", "crashed")
"""Outcomes of attempts whose answer never reached the device. Any other answer did, whatever it was worth."""


def attempts(events: pd.DataFrame) -> pd.DataFrame:
    """The rows in which a device really tried to reach the cloud."""
    return events[events.kind.isin(REQUESTS) & ~events.outcome.isin(UNASKED)]


def waiting_s(events: pd.DataFrame, quantiles: Sequence[float] = (0.5, 0.95, 0.99)) -> dict[float, float]:
    """Quantiles of the seconds that admitted requests waited for a place at the cloud; NaN where none was admitted.

    Those that left the queue for good count with the time they stayed in it.
    """
    waited = attempts(events).queued_s.dropna()
    return {q: float(waited.quantile(q)) if len(waited) else math.nan for q in quantiles}


def throughput_per_s(events: pd.DataFrame, bin_s: float = 3600.0) -> tuple[float, float]:
    """Answers a second that reached their devices, a seed: (over all bins in which somebody asked, in the busiest)."""
    tried = attempts(events)
    ended = (tried.time_s + tried.duration_s)[~tried.outcome.isin(UNDELIVERED)]
    if ended.empty:
        return 0.0, 0.0
    seeds = events.seed.nunique() if "seed" in events else 1
    begun, done = (tried.time_s // bin_s).astype(int), (ended // bin_s).astype(int)
    busy = len(set(begun) | set(done))
    return len(ended) / (busy * bin_s * seeds), int(done.value_counts().max()) / (bin_s * seeds)


def share_rate_limited(events: pd.DataFrame) -> tuple[float, float]:
    """(share of attempts that the cloud turned away as over its rate, share of requests that met this at all)."""
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
    """What the cloud was paid for, at the experiment's prices."""
    tried = attempts(events)
    tokens_in, tokens_out = int(tried.tokens_in.sum()), int(tried.tokens_out.sum())
    return Cost(tokens_in, tokens_out, price(capacity, tokens_in, tokens_out))


def traffic(events: pd.DataFrame, at_s: float = math.inf) -> Traffic:
    """The bytes of the attempts begun by `at_s`, as `sim.asking.traffic` counts them."""
    tried = attempts(events)
    tried = tried[tried.time_s <= at_s]
    moved = tried.bytes_up.fillna(0) + tried.bytes_down.fillna(0)
    flying = tried.time_s + tried.duration_s > at_s
    wasted = tried.outcome.isin(UNDELIVERED) & ~flying
    sums = {"in_flight": moved[flying], "wasted": moved[wasted], "received": moved[~flying & ~wasted]}
    return Traffic(float(moved.sum()), **{name: float(part.sum()) for name, part in sums.items()})


def wasted_energy_j(events: pd.DataFrame) -> float:
    """Energy that devices spent on attempts without an answer and on adapters that never went live."""
    lost = events.kind.isin(REQUESTS) & events.outcome.isin(UNDELIVERED)
    lost |= (events.kind == "train") & (events.outcome != "ok")
    return float(events.energy_j[lost].sum())


@dataclass(frozen=True, slots=True)
class Survival:
    """A Kaplan-Meier curve: after `times_s[i]` a share of `waiting[i]` still waits (before the first of them, all)."""

    times_s: np.ndarray
    waiting: np.ndarray

    def reached_s(self, share: float) -> float | None:
        """When that share of the devices had what they waited for; None if it never did."""
        reached = np.flatnonzero(1 - self.waiting >= share - 1e-12)
        return float(self.times_s[reached[0]]) if len(reached) else None


def survival(waited_s: Sequence[float], came: Sequence[bool]) -> Survival:
    """How many still wait, as time goes by. `came`: whether it came after that time; else no more is known (censored).

    Kaplan and Meier, JASA 1958: the product, over the times at which something came, of 1 - came / waiting.
    """
    waited, events = np.asarray(waited_s, dtype=float), np.asarray(came, dtype=bool)
    times, counts = np.unique(waited[events], return_counts=True)
    at_risk = np.array([(waited >= time).sum() for time in times], dtype=float)
    return Survival(times, np.cumprod(1 - counts / at_risk) if len(times) else np.array([]))


def first_adapters(events: pd.DataFrame, devices: int, end_s: float, arm: str = "collaborative") -> Survival:
    """From the run's start until each of `devices` devices (of all seeds) had an adapter of `arm` live that was trained
    with samples from the cloud. Devices that had none by `end_s` are censored there.
    """
    trained = events[(events.kind == "train") & (events.arm == arm) & (events.outcome == "ok")]
    trained = trained[trained.detail.fillna("").str.match(r"on samples\b")]
    names = ["seed", "device_id"] if "seed" in trained else ["device_id"]
    live_s = (trained.time_s + trained.duration_s).groupby([trained[name] for name in names]).min()
    live_s = live_s[live_s <= end_s]
    if len(live_s) > devices:
        raise ValueError(f"{len(live_s)} devices have adapters, but there are only {devices}")
    waited = [*live_s, *[end_s] * (devices - len(live_s))]
    return survival(waited, [True] * len(live_s) + [False] * (devices - len(live_s)))
