"""Asking the cloud in virtual time: each device's requests over its link, to a cloud that others use too (SimPy).

Only what meets others is an event: a request that reaches the cloud, a place in its queue. Everything on the link is
computed in closed form, and a device that waits for its link sleeps until it is up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from sim.cloud_capacity import Cloud
from sim.network.link import HANDSHAKES, Link
from sim.sections import CloudCapacity
from sim.seeding import derive


@dataclass(frozen=True, slots=True)
class Size:
    """What a request moves and costs. `outcome` is what the answer turned out to be (`ok`, `refused`, ...)."""

    bytes_up: int
    bytes_down: int
    tokens_in: int
    tokens_out: int
    outcome: str = "ok"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that a device wants to make. Lanes never meet: each has a cloud of its own (an arm's share of it).

    `at_s`: not before this moment (None: when the device asks in this round).
    """

    request_id: str
    device: int
    size: Size
    lane: str = "augment"
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try. Bytes are those that left their sender; tokens those the cloud spent; `queued_s` waited for a place.

    `radio_s` is how long the device's radio worked.
    """

    request_id: str
    device: int
    lane: str
    number: int
    start_s: float
    end_s: float
    outcome: str
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    queued_s: float = 0.0
    radio_s: float = 0.0
    retry_after_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Final:
    """What became of a request in the end. `failed_s`: when it first turned out that it would not go at once.

    `answered`: the cloud's answer reached the device, whatever it was worth (`outcome`).
    """

    request_id: str
    device: int
    lane: str
    outcome: str
    end_s: float
    attempts: int
    failed_s: float | None = None
    answered: bool = False


@dataclass
class Asked:
    """What a round of asking came to."""

    attempts: list[Attempt] = field(default_factory=list)
    finals: dict[str, Final] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)
    cloud_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes by what became of them: sent = received + wasted + in_flight."""

    sent: float
    received: float
    wasted: float
    in_flight: float


def traffic(attempts: Sequence[Attempt], at_s: float) -> Traffic:
    """The bytes of the attempts begun by `at_s`: received if their request was served, wasted if the attempt failed (an
    upload whose answer never came is of no use), in flight if it is still under way.
    """
    sums = {"received": 0.0, "wasted": 0.0, "in_flight": 0.0}
    for attempt in attempts:
        if attempt.start_s <= at_s:
            became = "in_flight" if attempt.end_s > at_s else "received" if attempt.outcome == "ok" else "wasted"
            sums[became] += attempt.bytes_up + attempt.bytes_down
    return Traffic(sum(sums.values()), **sums)


@dataclass(frozen=True, slots=True)
class Rules:
    """How devices ask in one round: from `start_s` on; no attempt begins at `end_s` or later."""

    seed: int
    round: int
    start_s: float
    end_s: float
    ask_within_s: float
    timeout_s: float
    capacity: CloudCapacity
    device_id: Callable[[int], str]

    def unit(self, device: int, *words: object) -> float:
        """A uniform draw from (seed, device, round, words)."""
        return derive(self.seed, self.device_id(device), self.round, *words) / 2**63


def ask_all(
    asks: Sequence[Ask], link_of: Callable[[int], Link], rules: Rules, cloud_state: Mapping[str, Any] | None = None,
    spent: Mapping[int, float] | None = None,
) -> Asked:  # fmt: skip
    """Simulates one lane of one round. The order of `asks` matters only within a device: it asks one after another."""
    env = simpy.Environment(initial_time=rules.start_s)
    cloud = Cloud(rules.capacity, env, dict(cloud_state or {}))
    asked = Asked(spent=dict(spent or {}))
    by_device: dict[int, list[Ask]] = defaultdict(list)
    for ask in asks:
        by_device[ask.device].append(ask)
    for device in sorted(by_device):
        asker = _Asker(env, cloud, rules, link_of(device), asked)
        env.process(asker.run(by_device[device]))
    env.run()
    asked.cloud_state = cloud.state_at(rules.end_s)
    return asked


class _Asker:
    """One device's requests, one after another."""

    def __init__(self, env: simpy.Environment, cloud: Cloud, rules: Rules, link: Link, asked: Asked):
        self.env, self.cloud, self.rules, self.link, self.asked = env, cloud, rules, link, asked

    def run(self, asks: Sequence[Ask]) -> Iterator[simpy.Event]:
        rules = self.rules
        moment_s = rules.start_s + rules.unit(asks[0].device, "ask") * rules.ask_within_s
        for ask in asks:
            wanted_s = moment_s if ask.at_s is None else ask.at_s
            yield from self._until(wanted_s)
            yield from self._request(ask)

    def _until(self, time_s: float) -> Iterator[simpy.Event]:
        """Waits until `time_s`, and never wakes a rounding error before it."""
        while self.env.now < time_s:
            yield self.env.timeout(time_s - self.env.now)

    def _request(self, ask: Ask) -> Iterator[simpy.Event]:
        env, rules, capacity = self.env, self.rules, self.rules.capacity
        asked_s, failed_s, last = env.now, None, None
        while True:
            up_s = self.link.next_up(env.now, rules.end_s)
            if up_s is None:
                if last is None:
                    last = self._note(ask, 0, "offline", "no link in what was left of the round")
                failed_s = asked_s if failed_s is None else failed_s
                break
            if up_s > env.now:
                failed_s = asked_s if failed_s is None else failed_s
                yield from self._until(up_s)
            number = 0 if last is None else last.number + 1
            price = self.cloud.price(ask.size.tokens_in, ask.size.tokens_out)
            if capacity.budget and self.asked.spent.get(ask.device, 0.0) + price > capacity.budget:
                last = self._note(ask, number, "over_budget", "cloud.capacity.budget is spent")
                failed_s = env.now if failed_s is None else failed_s
                break
            last = yield from self._attempt(ask, number)
            self.asked.attempts.append(last)
            if last.tokens_in or last.tokens_out:
                paid = self.cloud.price(last.tokens_in, last.tokens_out)
                self.asked.spent[ask.device] = self.asked.spent.get(ask.device, 0.0) + paid
            if last.outcome == "ok":
                break
            failed_s = env.now if failed_s is None else failed_s
            if number >= capacity.retries:
                break
            jitter = rules.unit(ask.device, ask.request_id, "backoff", number)
            backoff_s = min(capacity.max_backoff_s, capacity.backoff_s * 2.0 ** min(number, 60)) * (0.5 + 0.5 * jitter)
            wait_s = max(last.retry_after_s, backoff_s)
            if env.now + wait_s >= rules.end_s:
                break
            yield env.timeout(wait_s)
        self.asked.finals[ask.request_id] = Final(
            ask.request_id, ask.device, ask.lane, last.outcome, env.now, last.number + 1, failed_s,
            last.outcome == "ok",
        )

    def _note(self, ask: Ask, number: int, outcome: str, detail: str) -> Attempt:
        now_s = self.env.now
        attempt = Attempt(ask.request_id, ask.device, ask.lane, number, now_s, now_s, outcome, detail=detail)
        self.asked.attempts.append(attempt)
        return attempt

    def _attempt(self, ask: Ask, number: int) -> Iterator[Any]:
        """Handshake, upload, the cloud, download: to the end of the first of them that fails."""
        env, link, cloud, size = self.env, self.link, self.cloud, ask.size
        start_s = env.now
        deadline_s = start_s + self.rules.timeout_s
        limit_s = min(deadline_s, link.up_until(start_s, deadline_s))
        first = "timeout" if limit_s == deadline_s else "dropped"
        found: dict[str, Any] = {}

        def ended(at_s: float, outcome: str = first) -> Attempt:
            """The attempt as ended by `outcome` or, without one, by the link's end or the deadline."""
            return Attempt(ask.request_id, ask.device, ask.lane, number, start_s, at_s, outcome, **found)

        sending_s = start_s + HANDSHAKES * link.rtt_s
        if sending_s >= limit_s:
            yield env.timeout(limit_s - start_s)
            return ended(limit_s)
        sent_s, found["bytes_up"] = _send(link, sending_s, size.bytes_up, "up", limit_s)
        found["radio_s"] = sent_s - start_s
        arrives_s = sent_s + link.rtt_s / 2
        if found["bytes_up"] < size.bytes_up or arrives_s >= limit_s:
            yield env.timeout(limit_s - start_s)
            return ended(limit_s)
        yield env.timeout(arrives_s - start_s)

        verdict = cloud.admit(size.tokens_in + size.tokens_out)
        if verdict.outcome != "ok":
            told_s = env.now + link.rtt_s / 2
            yield env.timeout(max(0.0, min(told_s, limit_s) - env.now))
            if told_s >= limit_s:
                return ended(limit_s)
            found |= {"retry_after_s": verdict.retry_after_s, "detail": verdict.detail}
            return ended(told_s, verdict.outcome)
        if cloud.places is None:
            served, done_s = yield from self._serve(size, limit_s)
        else:
            with cloud.places.request() as place:
                if not place.triggered:
                    yield place | env.timeout(max(0.0, limit_s - env.now))
                found["queued_s"] = env.now - arrives_s
                if not place.triggered:
                    found["detail"] = "in the cloud's queue"
                    return ended(env.now)
                served, done_s = yield from self._serve(size, limit_s)
                cloud.busy_until.append(env.now)
        found |= {"tokens_in": size.tokens_in, "tokens_out": size.tokens_out if served == "ok" else 0}
        if served != "ok":
            found["detail"] = "outage of the cloud" if served else "while the cloud wrote"
            return ended(env.now, served or first)

        coming_s = done_s + link.rtt_s / 2
        if coming_s >= limit_s:
            yield env.timeout(max(0.0, limit_s - env.now))
            return ended(limit_s)
        got_s, found["bytes_down"] = _send(link, coming_s, size.bytes_down, "down", limit_s)
        found["radio_s"] += got_s - coming_s
        yield env.timeout(got_s - env.now)
        return ended(got_s, "ok" if found["bytes_down"] == size.bytes_down else first)

    def _serve(self, size: Size, limit_s: float) -> Iterator[Any]:
        """At a place: (`ok`, an outage's outcome, or nothing where the asker is gone first; when it was done)."""
        env = self.env
        done_s = env.now + self.cloud.service_s(size.tokens_in, size.tokens_out)
        closes_s = self.cloud.closes_s(env.now, min(done_s, limit_s))
        until_s = min(done_s, limit_s, closes_s)
        if until_s > env.now:
            yield env.timeout(until_s - env.now)
        if closes_s < min(done_s, limit_s):
            return "server_error", closes_s
        return ("ok", done_s) if done_s <= limit_s else ("", limit_s)


def _send(link: Link, start_s: float, size_bytes: int, way: str, limit_s: float) -> tuple[float, float]:
    """(end, bytes sent by then) of a transfer that is given up at `limit_s`, at the latest the link's own end."""
    sent = link.transfer(start_s, size_bytes, way)
    if not sent.dropped and sent.end_s <= limit_s:
        return sent.end_s, size_bytes
    bandwidth = link.uplink if way == "up" else link.downlink
    return limit_s, min(bandwidth.bits(start_s, limit_s) / 8, size_bytes * (1 - 1e-12) - 1e-9)
