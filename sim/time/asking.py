"""Requests to the cloud in virtual time: each device's over its own link, to a cloud that others use too.

Only a request's arrival at the cloud, where it meets others, is an event. Everything on the link is computed in closed
form, and so is the course of a request at a cloud that serves in the order of arrival. A round is therefore one pass
over the arrivals, in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from operator import attrgetter
from typing import Any

from untether.sim.core.seeding import derive
from untether.sim.experiment.virtual_sections import CloudCapacity
from untether.sim.time.cloud_capacity import VirtualCloud, price
from untether.sim.time.network.link import HANDSHAKES, Link

TOLD_EVERY = 20_000
"""Devices after which whoever watches is told."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a request transfers and costs.

    `outcome` is that of the answer (`ok`, `refused`, ...); `bodies`: how often its message is in `bytes_up` (once more
    for each answer that was drawn again).
    """

    bytes_up: int
    bytes_down: int
    tokens_in: int
    tokens_out: int
    outcome: str = "ok"
    bodies: int = 1


@dataclass(slots=True)
class Ask:
    """A request that a device wants to make. Each lane has a cloud of its own (an arm's share of it).

    `at_s`: not before this moment (None: when the device asks in this round).
    """

    request_id: str
    device: int
    size: Size
    lane: str = "augment"
    at_s: float | None = None


@dataclass(slots=True)
class VirtualAttempt:
    """One attempt. Bytes are those that left their sender; tokens those the cloud spent.

    `queued_s`: how long it waited for a place (None: it was not admitted); `arrived_s`: since when; `place_s`: when it
    began and ended there (None: it had none). `radio_s`: how long its radio worked.
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
    queued_s: float | None = None
    arrived_s: float = 0.0
    place_s: tuple[float, float] | None = None
    radio_s: float = 0.0
    retry_after_s: float = 0.0
    detail: str = ""


@dataclass(slots=True)
class Final:
    """The final state of a request. `failed_s`: when it first turned out that it would not succeed at once.

    `answered`: whether the cloud's answer reached the device, of whatever `outcome`.
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
    """The result of a round's requests; attempts in the order in which they ended."""

    attempts: list[VirtualAttempt] = field(default_factory=list)
    finals: dict[str, Final] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)
    cloud_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes by their fate: sent = received + wasted + in_flight."""

    sent: float
    received: float
    wasted: float
    in_flight: float


def traffic(attempts: Sequence[VirtualAttempt], at_s: float) -> Traffic:
    """Returns the bytes of the attempts that began by `at_s`.

    They are received if their request was served, wasted if the attempt failed (an upload whose answer never came is of
    no use), in flight if it is still under way.
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
        """Returns a uniform draw from (seed, device, round, words)."""
        return derive(self.seed, self.device_id(device), self.round, *words) / 2**63

    def moment_s(self, device: int) -> float:
        """Returns when a device asks, but for requests that have a time of their own."""
        return self.start_s + (self.unit(device, "ask") * self.ask_within_s if self.ask_within_s else 0.0)


def ask_all(
    asks: Sequence[Ask], link_of: Callable[[int], Link], rules: Rules, cloud_state: Mapping[str, Any] | None = None,
    spent: Mapping[int, float] | None = None, sizes: Mapping[str, Size] | None = None,
    as_planned: Mapping[str, Sequence[VirtualAttempt]] | None = None, told: Callable[[int], None] | None = None,
) -> Asked:  # fmt: skip
    """Simulates one lane of one round.

    Args:
        asks: The requests; their order matters only within a device, which asks one after another.
        link_of: The link of a device.
        rules: Of the round.
        cloud_state: What the round before left to the cloud.
        spent: Money spent so far, by device (against `cloud.capacity.budget`).
        sizes: Those that differ from what the requests themselves say.
        as_planned: Attempts of requests that failed in an earlier simulation of the same round and are not made again:
            each keeps its device busy, and takes of the cloud and costs what it did there; it has neither attempts nor
            an end in the result.
        told: Hears now and then how many devices have begun to ask.
    """
    cloud, asked = VirtualCloud(rules.capacity, cloud_state), Asked(spent=dict(spent or {}))
    by_device: dict[int, list[Ask]] = defaultdict(list)
    for ask in asks:
        by_device[ask.device].append(ask)
    known = (sizes or {}, as_planned or {})
    firsts = ((device, own[0].at_s) for device, own in by_device.items())
    begins = ((rules.moment_s(device) if at_s is None else at_s, device) for device, at_s in firsts)
    waiting = sorted(begins, reverse=True)
    arrivals: list[tuple[float, int, Iterator[float]]] = []
    begun = 0
    while arrivals or waiting:
        if waiting and (not arrivals or waiting[-1][0] <= arrivals[0][0]):  # one that may arrive first begins to ask
            begins_s, device = waiting.pop()
            own = by_device.pop(device)
            moment_s = begins_s if own[0].at_s is None else rules.moment_s(device)
            run = _Asker(device, cloud, rules, link_of(device), asked, *known).run(own, moment_s)
            if (first_s := next(run, None)) is not None:
                heappush(arrivals, (first_s, device, run))
            begun += 1
            if told is not None and not begun % TOLD_EVERY:
                told(begun)
            continue
        _, device, run = arrivals[0]
        next_s = next(run, None)
        if next_s is None:
            heappop(arrivals)
        else:
            heapreplace(arrivals, (next_s, device, run))
    asked.attempts.sort(key=attrgetter("end_s"))
    asked.cloud_state = cloud.state_at(rules.end_s)
    return asked


class _Asker:
    """One device's requests, one after another. Its generators yield when a request arrives at the cloud, and go on
    when all that arrive earlier have been there.
    """

    def __init__(
        self, device: int, cloud: VirtualCloud, rules: Rules, link: Link, asked: Asked, sizes: Mapping[str, Size],
        as_planned: Mapping[str, Sequence[VirtualAttempt]],
    ):  # fmt: skip
        self.device, self.cloud, self.rules, self.link, self.asked = device, cloud, rules, link, asked
        self.sizes, self.as_planned, self.now_s = sizes, as_planned, rules.start_s

    def run(self, asks: Sequence[Ask], moment_s: float) -> Iterator[float]:
        for ask in asks:
            self.now_s = max(self.now_s, moment_s if ask.at_s is None else ask.at_s)
            if (planned := self.as_planned.get(ask.request_id)) is not None:
                yield from self._repeat(ask, planned)
            else:
                yield from self._request(ask, self.sizes.get(ask.request_id, ask.size))

    def _repeat(self, ask: Ask, attempts: Sequence[VirtualAttempt]) -> Iterator[float]:
        for attempt in attempts:
            if attempt.queued_s is not None:
                yield attempt.arrived_s
                tokens = ask.size.tokens_in + ask.size.tokens_out
                self.cloud.repeat(attempt.arrived_s, tokens, attempt.place_s, attempt.end_s)
            self._pay(attempt)
            self.now_s = max(self.now_s, attempt.end_s)

    def _pay(self, attempt: VirtualAttempt) -> None:
        if paid := price(self.rules.capacity, attempt.tokens_in, attempt.tokens_out):
            self.asked.spent[self.device] = self.asked.spent.get(self.device, 0.0) + paid

    def _request(self, ask: Ask, size: Size) -> Iterator[float]:
        rules, capacity, spent = self.rules, self.rules.capacity, self.asked.spent
        asked_s, failed_s, last, number = self.now_s, None, None, 0
        while True:
            up_s = self.link.next_up(self.now_s, rules.end_s)
            if up_s is None:
                if last is None:
                    last = self._note(ask, 0, "offline", "no link in what was left of the round")
                failed_s = asked_s if failed_s is None else failed_s
                break
            if up_s > self.now_s:
                failed_s = asked_s if failed_s is None else failed_s
                self.now_s = up_s
            if capacity.budget:
                costs = price(capacity, size.tokens_in, size.tokens_out)
                if spent.get(self.device, 0.0) + costs > capacity.budget:
                    last = self._note(ask, number, "over_budget", "cloud.capacity.budget is spent")
                    failed_s = self.now_s if failed_s is None else failed_s
                    break
            last = yield from self._attempt(ask, size, number)
            self.asked.attempts.append(last)
            self.now_s = last.end_s
            self._pay(last)
            if last.outcome == "ok":
                break
            failed_s = self.now_s if failed_s is None else failed_s
            if number >= capacity.retries:
                break
            jitter = rules.unit(self.device, ask.request_id, "backoff", number)
            backoff_s = min(capacity.max_backoff_s, capacity.backoff_s * 2.0 ** min(number, 60)) * (0.5 + 0.5 * jitter)
            wait_s = max(last.retry_after_s, backoff_s)
            if self.now_s + wait_s >= rules.end_s:
                break
            self.now_s += wait_s
            number += 1
        self.asked.finals[ask.request_id] = Final(
            ask.request_id, ask.device, ask.lane, last.outcome, self.now_s, last.number + 1, failed_s,
            last.outcome == "ok",
        )

    def _note(self, ask: Ask, number: int, outcome: str, detail: str) -> VirtualAttempt:
        attempt = VirtualAttempt(
            ask.request_id, ask.device, ask.lane, number, self.now_s, self.now_s, outcome, detail=detail
        )
        self.asked.attempts.append(attempt)
        return attempt

    def _attempt(self, ask: Ask, size: Size, number: int) -> Iterator[float]:
        """Handshake, upload, the cloud, download: to the end of the first of them that fails."""
        link, cloud, start_s = self.link, self.cloud, self.now_s
        deadline_s = start_s + self.rules.timeout_s
        limit_s = min(deadline_s, link.up_until(start_s, deadline_s))
        first = "timeout" if limit_s == deadline_s else "dropped"
        found: dict[str, Any] = {}

        def ended(at_s: float, outcome: str = first) -> VirtualAttempt:
            """The attempt as ended by `outcome` or, without one, by the link's end or the deadline."""
            return VirtualAttempt(ask.request_id, ask.device, ask.lane, number, start_s, at_s, outcome, **found)

        sending_s = start_s + HANDSHAKES * link.rtt_s
        if sending_s >= limit_s:
            return ended(limit_s)
        up = link.transfer(sending_s, size.bytes_up, "up", limit_s)
        found |= {"bytes_up": up.sent_bytes, "radio_s": up.end_s - start_s}
        arrives_s = up.end_s + link.rtt_s / 2
        if up.dropped or arrives_s >= limit_s:
            return ended(limit_s)
        yield arrives_s

        verdict = cloud.admit(arrives_s, size.tokens_in + size.tokens_out)
        if verdict.outcome != "ok":
            response_s = arrives_s + link.rtt_s / 2
            if response_s >= limit_s:
                return ended(limit_s)
            found |= {"retry_after_s": verdict.retry_after_s, "detail": verdict.detail}
            return ended(response_s, verdict.outcome)
        served = cloud.serve(arrives_s, limit_s, size.tokens_in, size.tokens_out)
        found |= {"queued_s": served.queued_s, "arrived_s": arrives_s}
        if not served.begun:
            found["detail"] = "in the cloud's queue"
            return ended(served.end_s)
        found["place_s"] = (arrives_s + served.queued_s, served.end_s)
        found |= {"tokens_in": size.tokens_in, "tokens_out": served.tokens_out}
        if served.outcome == "gone":
            found["detail"] = "while the cloud wrote"
            return ended(served.end_s)
        if served.outcome != "ok":
            found["detail"] = "outage of the cloud"
            return ended(served.end_s, served.outcome)

        coming_s = served.end_s + link.rtt_s / 2
        if coming_s >= limit_s:
            return ended(limit_s)
        down = link.transfer(coming_s, size.bytes_down, "down", limit_s)
        found["bytes_down"] = down.sent_bytes
        found["radio_s"] += down.end_s - coming_s
        return ended(down.end_s, first if down.dropped else "ok")
