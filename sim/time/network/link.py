"""A device's link to the cloud: the cable as an object between sender and receiver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from untether.sim.time.network.bandwidth import Bandwidth
from untether.sim.time.network.spells import Spells, next_up, seconds_up, up_until

HANDSHAKES = 2.0
"""Round trips before the first byte of a request: TCP's (RFC 9293) and TLS 1.3's (RFC 8446)."""


@dataclass(slots=True)
class Transfer:
    """The result of a transfer.

    `sent_bytes` left the sender by `end_s`; if `dropped`, the link went down (or the sender gave up) first, and they
    are lost.
    """

    start_s: float
    end_s: float
    sent_bytes: float
    dropped: bool


@dataclass(frozen=True, slots=True)
class Link:
    """When a link is up, and how fast each way while it is. Its bandwidth log goes on (unused) while it is down."""

    spells: Spells
    downlink: Bandwidth
    uplink: Bandwidth
    rtt_s: float

    def is_up(self, time_s: float) -> bool:
        return self.spells.at(time_s)[0]

    def next_up(self, time_s: float, end_s: float) -> float | None:
        """Returns the first time it is up from `time_s` on and before `end_s`, or None."""
        return next_up(self.spells, time_s, end_s)

    def up_until(self, time_s: float, end_s: float = math.inf) -> float:
        """Returns the end of the spell around `time_s` (exact if before `end_s`)."""
        return up_until(self.spells, time_s, end_s)

    def seconds_up(self, start_s: float, end_s: float) -> float:
        """Returns how many seconds it is up within [start_s, end_s)."""
        return seconds_up(self.spells, start_s, end_s)

    def transfer(
        self, start_s: float, size_bytes: float, way: Literal["up", "down"], limit_s: float | None = None
    ) -> Transfer:
        """Sends `size_bytes` from `start_s` on: integrates the bandwidth up to the last bit, or to the link's drop.

        `limit_s`: when the sender gives up, where the caller knows that the link does not end before.
        """
        bandwidth = self.uplink if way == "up" else self.downlink
        done_s = bandwidth.done(start_s, size_bytes * 8)
        if limit_s is None:
            limit_s = self.up_until(start_s, done_s)
        if done_s <= limit_s:
            return Transfer(start_s, done_s, size_bytes, False)
        return Transfer(start_s, limit_s, min(size_bytes, bandwidth.bits(start_s, limit_s) / 8), True)
