"""How fast a link is while it is up: bits as an integral over time, and the time that a number of bits takes.

A log is kept as knots (time, bits so far) with straight lines between them, so both questions are one bisection each,
however long the transfer and however often the log is looped.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

ROUNDING = 1e-9
"""Share of a log's bits that sums of floats may be off by."""


class Bandwidth(Protocol):
    """Bits a second over time."""

    def bits(self, start_s: float, end_s: float) -> float:
        """Returns the bits that pass within [start_s, end_s]."""
        ...

    def done(self, start_s: float, bits: float) -> float:
        """Returns the time at which `bits` that began at `start_s` have passed (inf: never)."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant bandwidth."""

    bits_per_s: float

    def bits(self, start_s: float, end_s: float) -> float:
        return (end_s - start_s) * self.bits_per_s

    def done(self, start_s: float, bits: float) -> float:
        return start_s + bits / self.bits_per_s


@dataclass(frozen=True)
class Log:
    """One bandwidth log.

    Args:
        times_s, bits: Its knots, both from 0 and never falling; no bit passes in no time.
        latency_s: Its mean round-trip time; None: not in the log.
        name: Where it came from.

    Raises:
        ValueError: The knots are others: what passes at one moment would be lost where a transfer begins or ends.
    """

    name: str
    times_s: tuple[float, ...]
    bits: tuple[float, ...]
    latency_s: float | None = None
    slopes: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = list(zip(self.times_s, self.times_s[1:], self.bits, self.bits[1:], strict=False))
        if (
            len(self.times_s) != len(self.bits) or (self.times_s[0], self.bits[0]) != (0, 0) or self.times_s[-1] <= 0
            or any(b < a or d < c or (a == b and c != d) for a, b, c, d in pairs)
        ):  # fmt: skip
            raise ValueError(f"{self.name}: times and bits must begin at 0, never fall, and rise in time or not at all")
        object.__setattr__(self, "slopes", tuple((d - c) / (b - a) if b > a else 0.0 for a, b, c, d in pairs))

    @property
    def duration_s(self) -> float:
        """After which it is looped."""
        return self.times_s[-1]

    @property
    def mean_bits_per_s(self) -> float:
        """Over the whole log."""
        return self.bits[-1] / self.times_s[-1]

    def bits_at(self, time_s: float) -> float:
        """Returns the bits that passed by a time within the log."""
        index = min(bisect_right(self.times_s, time_s), len(self.times_s) - 1) - 1
        return self.bits[index] + (time_s - self.times_s[index]) * self.slopes[index]

    def time_of(self, bits: float) -> float:
        """Returns the first time at which so many bits, within the log's total, have passed.

        Bits that exceed a knot by no more than rounding have passed with it: a silence after the knot is not waited
        for.
        """
        index = max(bisect_left(self.bits, bits) - 1, 0)
        over = bits - self.bits[index]
        if over <= ROUNDING * self.bits[-1]:
            return self.times_s[bisect_left(self.bits, self.bits[index])]
        slope = self.slopes[index]
        return min(self.times_s[index] + over / slope, self.times_s[index + 1]) if slope else self.times_s[index]


@dataclass(frozen=True, slots=True)
class LoopedLog:
    """A log repeated for ever, scaled, beginning `phase_s` into it."""

    log: Log
    phase_s: float = 0.0
    scale: float = 1.0

    def bits(self, start_s: float, end_s: float) -> float:
        return (self._so_far(end_s) - self._so_far(start_s)) * self.scale

    def done(self, start_s: float, bits: float) -> float:
        total = self.log.bits[-1]
        if bits <= 0:
            return start_s
        if total <= 0:
            return math.inf
        loop, within_s = divmod(start_s + self.phase_s, self.log.duration_s)
        loops, rest = divmod(self.log.bits_at(within_s) + bits / self.scale, total)
        if rest <= ROUNDING * total and loops:  # the end of a loop, not the (maybe silent) beginning of the next
            loops, rest = loops - 1, total
        return max(start_s, (loop + loops) * self.log.duration_s + self.log.time_of(rest) - self.phase_s)

    def _so_far(self, time_s: float) -> float:
        loops, rest = divmod(time_s + self.phase_s, self.log.duration_s)
        return loops * self.log.bits[-1] + self.log.bits_at(rest)


def log_of_rates(name: str, durations_s: Sequence[float], rates: Sequence[float], latency_s: float | None) -> Log:
    """Returns a log of constant pieces: so many bits a second for so long each; one without duration carries nothing.
    """
    times, bits = [0.0], [0.0]
    for duration, rate in zip(durations_s, rates, strict=True):
        end_s = times[-1] + duration
        if end_s > times[-1]:
            times.append(end_s)
            bits.append(bits[-1] + duration * rate)
    return Log(name, tuple(times), tuple(bits), latency_s)
