"""A cloud that many devices share: places, a queue, token rates, rate limits, outages and a price, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Any

from untether.sim.core.clock import Span
from untether.sim.experiment.virtual_sections import CloudCapacity
from untether.sim.time.network.links import merged
from untether.sim.time.network.spells import ALWAYS, Spells, Windows, up_until

MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Verdict:
    """The cloud's response to an arriving request: `ok`, or an outcome, with the wait it asks for (Retry-After)."""

    outcome: str
    retry_after_s: float = 0.0
    detail: str = ""


ADMITTED = Verdict("ok")


class TokenBucket:
    """A rate limit a minute, accumulated for a minute at most; a larger amount passes when the bucket is full."""

    def __init__(self, per_minute: float, level: float | None = None, time_s: float = 0.0):
        self.capacity, self.time_s = per_minute, time_s
        self.level = per_minute if level is None else level

    def wait_s(self, now_s: float, amount: float) -> float:
        """Returns how long until `amount` could be taken; 0: now. Changes nothing."""
        missing = min(amount, self.capacity) - self._level(now_s)
        return missing * 60 / self.capacity if missing > 1e-9 * self.capacity else 0.0

    def take(self, now_s: float, amount: float) -> None:
        self.level, self.time_s = self._level(now_s) - min(amount, self.capacity), now_s

    def _level(self, now_s: float) -> float:
        return min(self.capacity, self.level + (now_s - self.time_s) * self.capacity / 60)


@dataclass(slots=True)
class Served:
    """What a request got of the cloud: `queued_s` in the queue, then a place until `end_s`.

    `outcome`: `ok`; `server_error` (an outage cut it short); `gone`, where its device had left (`begun`: from a place).
    `tokens_out`: written until then, and charged for (also when the device left, but not in an outage).
    """

    end_s: float
    outcome: str
    queued_s: float = 0.0
    begun: bool = True
    tokens_out: int = 0


class VirtualCloud:
    """The cloud of one lane. Requests must arrive in order of time.

    First come, first served, by places that take as long as the tokens require: so the whole course of a request is
    known when it arrives, since later ones change nothing. `state` carries it from round to round (see `state_at`).
    """

    def __init__(self, capacity: CloudCapacity, state: Mapping[str, Any] | None = None):
        self.capacity = capacity
        state = state or {}
        self.buckets = {
            name: TokenBucket(per_minute, *state.get(name, (None, 0.0)))
            for name, per_minute in (("requests", capacity.requests_per_minute), ("tokens", capacity.tokens_per_minute))
            if per_minute
        }
        self.open = outages(capacity)
        self._free_s: list[float] = list(state.get("places", ()))
        """A heap: when each place that was ever taken is free again."""
        self._leave_s: list[float] = list(state.get("queue", ()))
        """A heap: when each that waits leaves the queue, for a place or for good."""

    def admit(self, now_s: float, tokens: int) -> Verdict:
        """Returns the response to a request of so many tokens on arrival. `ok` counts it against the rate limits."""
        if not self.open.at(now_s)[0]:
            return Verdict("unreachable", detail="outage of the cloud")
        if self.capacity.queue >= 0 and self._place_s(now_s) > now_s and self.waiting(now_s) >= self.capacity.queue:
            return Verdict("server_error", detail="queue full")
        if not self.buckets:
            return ADMITTED
        amounts = {"requests": 1, "tokens": tokens}
        waits = {name: bucket.wait_s(now_s, amounts[name]) for name, bucket in self.buckets.items()}
        if any(waits.values()):
            name = max(waits, key=waits.__getitem__)
            return Verdict("rate_limited", waits[name], f"{name} a minute")
        for name, bucket in self.buckets.items():
            bucket.take(now_s, amounts[name])
        return ADMITTED

    def waiting(self, now_s: float) -> int:
        """Returns how many requests wait in the queue."""
        while self._leave_s and self._leave_s[0] <= now_s:
            heappop(self._leave_s)
        return len(self._leave_s)

    def serve(self, now_s: float, limit_s: float, tokens_in: int, tokens_out: int) -> Served:
        """Gives an admitted request the first free place.

        Args:
            now_s: When it arrived.
            limit_s: When its device leaves, in whatever state it is by then.
            tokens_in, tokens_out: Of the request.
        """
        begins_s = self._place_s(now_s)
        if begins_s > now_s:
            heappush(self._leave_s, min(begins_s, limit_s))
            if begins_s >= limit_s:
                return Served(limit_s, "gone", limit_s - now_s, False)
        done_s = begins_s + self.service_s(tokens_in, tokens_out)
        end_s, outcome = (done_s, "ok") if done_s <= limit_s else (limit_s, "gone")
        closes_s = math.inf if self.open is ALWAYS else up_until(self.open, begins_s, end_s)
        if closes_s < end_s:
            end_s, outcome = closes_s, "server_error"
        self._take_place(end_s)
        written = {"ok": tokens_out, "gone": self._written(end_s - begins_s, tokens_in, tokens_out)}.get(outcome, 0)
        return Served(end_s, outcome, begins_s - now_s, tokens_out=written)

    def repeat(self, now_s: float, tokens: int, place_s: tuple[float, float] | None, left_s: float) -> None:
        """Takes the capacity that an earlier simulation gave a request: rate limits, queue and place. Serves nothing.

        Args:
            now_s: When it arrived.
            tokens: Counted against the rate limits.
            place_s: When it began and ended at a place; it takes the first free one for the rest of that time.
            left_s: When it left the queue.
        """
        for name, bucket in self.buckets.items():
            bucket.take(now_s, {"requests": 1, "tokens": tokens}[name])
        until_s = left_s if place_s is None else place_s[0]
        if until_s > now_s:
            heappush(self._leave_s, until_s)
        if place_s is not None and self._place_s(place_s[0]) < place_s[1]:
            self._take_place(place_s[1])

    def _take_place(self, end_s: float) -> None:
        if self.capacity.concurrency:
            place = heappush if len(self._free_s) < self.capacity.concurrency else heapreplace
            place(self._free_s, end_s)

    def _written(self, seconds: float, tokens_in: int, tokens_out: int) -> int:
        """Whole tokens of an answer that are written within so many seconds at a place."""
        writing_s = seconds - self.service_s(tokens_in, 0)
        rate = self.capacity.output_tokens_per_s
        return min(tokens_out, max(0, math.floor(writing_s * rate))) if rate else 0

    def service_s(self, tokens_in: int, tokens_out: int) -> float:
        """Returns the seconds at a place: reading the prompt, then writing."""
        rates = ((tokens_in, self.capacity.prompt_tokens_per_s), (tokens_out, self.capacity.output_tokens_per_s))
        return sum(tokens / rate for tokens, rate in rates if rate)

    def state_at(self, time_s: float) -> dict[str, Any]:
        """Returns the state for the next round (JSON): the buckets, the taken places and the queue beyond `time_s`."""
        state: dict[str, Any] = {name: [bucket.level, bucket.time_s] for name, bucket in self.buckets.items()}
        places, queue = (sorted(until for until in heap if until > time_s) for heap in (self._free_s, self._leave_s))
        return {**state, "places": places, "queue": queue}

    def _place_s(self, now_s: float) -> float:
        """When the first place is free for whoever comes now."""
        if len(self._free_s) < self.capacity.concurrency or not self._free_s:
            return now_s
        return max(now_s, self._free_s[0])


def price(capacity: CloudCapacity, tokens_in: float, tokens_out: float) -> float:
    """Returns the price of these tokens."""
    return (tokens_in * capacity.price_in + tokens_out * capacity.price_out) / MILLION


def outages(capacity: CloudCapacity) -> Spells:
    """Returns the spells in which the cloud is available."""
    spans = sorted((span.start_s, span.end_s) for span in map(Span.parse, capacity.outages))
    return Windows(merged(spans), inside_up=False) if spans else ALWAYS
