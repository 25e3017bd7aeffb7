"""A cloud that many devices share: places, a queue, token rates, rate limits, outages and a price, in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import simpy

from sim.clock import Span
from sim.network.links import merged
from sim.network.spells import ALWAYS, Spells, Windows, up_until
from sim.sections import CloudCapacity

MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the cloud says to a request that arrives: `ok`, or an outcome, with the wait it asks for (Retry-After)."""

    outcome: str
    retry_after_s: float = 0.0
    detail: str = ""


class TokenBucket:
    """So much a minute, saved up for a minute at most; more than a minute's worth passes when the bucket is full."""

    def __init__(self, per_minute: float, level: float | None = None, time_s: float = 0.0):
        self.capacity, self.time_s = per_minute, time_s
        self.level = per_minute if level is None else level

    def wait_s(self, now_s: float, amount: float) -> float:
        """How long until `amount` could be taken; 0: now."""
        self.level = min(self.capacity, self.level + (now_s - self.time_s) * self.capacity / 60)
        self.time_s = now_s
        missing = min(amount, self.capacity) - self.level
        return missing * 60 / self.capacity if missing > 1e-9 * self.capacity else 0.0

    def take(self, amount: float) -> None:
        self.level -= min(amount, self.capacity)


class Cloud:
    """The cloud of one lane in one SimPy environment. `state` carries it from round to round (see `state_at`)."""

    def __init__(self, capacity: CloudCapacity, env: simpy.Environment, state: dict[str, Any] | None = None):
        self.capacity, self.env = capacity, env
        state = state or {}
        self.buckets = {
            name: TokenBucket(per_minute, *state.get(name, (None, 0.0)))
            for name, per_minute in (("requests", capacity.requests_per_minute), ("tokens", capacity.tokens_per_minute))
            if per_minute
        }
        self.places = simpy.Resource(env, capacity.concurrency) if capacity.concurrency else None
        self.open = outages(capacity)
        self.busy_until: list[float] = []
        """When each place that was ever taken was given back, or will be."""
        for until_s in state.get("busy_until", ()):
            if self.places is not None and until_s > env.now:
                env.process(self._hold(until_s))

    def admit(self, tokens: int) -> Verdict:
        """What a request of so many tokens meets on arrival. `ok` counts it against the rate limits."""
        now_s = self.env.now
        if not self.open.at(now_s)[0]:
            return Verdict("unreachable", detail="outage of the cloud")
        full = self.capacity.queue >= 0 and self.places is not None and self.places.count >= self.places.capacity
        if full and len(self.places.queue) >= self.capacity.queue:
            return Verdict("server_error", detail="queue full")
        amounts = {"requests": 1, "tokens": tokens}
        waits = {name: bucket.wait_s(now_s, amounts[name]) for name, bucket in self.buckets.items()}
        if any(waits.values()):
            name = max(waits, key=waits.__getitem__)
            return Verdict("rate_limited", waits[name], f"{name} a minute")
        for name, bucket in self.buckets.items():
            bucket.take(amounts[name])
        return Verdict("ok")

    def service_s(self, tokens_in: int, tokens_out: int) -> float:
        """Seconds at a place: reading the prompt, then writing."""
        rates = ((tokens_in, self.capacity.prompt_tokens_per_s), (tokens_out, self.capacity.output_tokens_per_s))
        return sum(tokens / rate for tokens, rate in rates if rate)

    def closes_s(self, start_s: float, end_s: float) -> float:
        """When an outage ends what began at `start_s` (exact if before `end_s`)."""
        return math.inf if self.open is ALWAYS else up_until(self.open, start_s, end_s)

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """What these tokens cost."""
        return (tokens_in * self.capacity.price_in + tokens_out * self.capacity.price_out) / MILLION

    def state_at(self, time_s: float) -> dict[str, Any]:
        """What the next round must know (JSON): the buckets, and the places taken beyond `time_s`."""
        state: dict[str, Any] = {name: [bucket.level, bucket.time_s] for name, bucket in self.buckets.items()}
        return {**state, "busy_until": sorted(until for until in self.busy_until if until > time_s)}

    def _hold(self, until_s: float):
        with self.places.request() as place:
            yield place
            self.busy_until.append(until_s)
            yield self.env.timeout(until_s - self.env.now)


def outages(capacity: CloudCapacity) -> Spells:
    """When the cloud is open."""
    spans = sorted((span.start_s, span.end_s) for span in map(Span.parse, capacity.outages))
    return Windows(merged(spans), inside_up=False) if spans else ALWAYS
