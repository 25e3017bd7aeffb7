"""What is shared on its way to a device and back, over the device's own link: closed form, one device at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from untether.sim.time.network.link import HANDSHAKES, Link


@dataclass(frozen=True, slots=True)
class Carried:
    """One try. `bytes` are those that left their sender; `outcome`: `ok`, or `dropped` by the link."""

    device: int
    way: Literal["up", "down"]
    number: int
    start_s: float
    end_s: float
    outcome: str
    bytes: float


def carry(
    link: Link, device: int, start_s: float, end_s: float, size_bytes: float, way: Literal["up", "down"]
) -> tuple[list[Carried], float | None]:
    """Sends so many bytes as soon as the link is up, and from the beginning again when it drops.

    Returns:
        The tries, and when the last bit arrived: None if it did not before `end_s`.
    """
    tries: list[Carried] = []
    now_s = start_s
    while (up_s := link.next_up(now_s, end_s)) is not None:
        begun_s = up_s + HANDSHAKES * link.rtt_s
        limit_s = min(link.up_until(up_s, end_s), end_s)
        if begun_s >= limit_s:
            now_s = max(limit_s, up_s + 1e-6)
            continue
        sent = link.transfer(begun_s, size_bytes, way, limit_s)
        done = not sent.dropped
        tries.append(Carried(device, way, len(tries), up_s, sent.end_s, "ok" if done else "dropped", sent.sent_bytes))
        if done:
            return tries, sent.end_s
        now_s = max(sent.end_s, up_s + 1e-6)
    return tries, None
