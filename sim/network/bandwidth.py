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


class Bandwidth(Protocol):
    """Bits a second over time."""

    def bits(self, start_s: float, end_s: float) -> float:
        """What passes within [start_s, end_s]."""
        ...

    def done(self, start_s: float, bits: float) -> float:
        """When `bits` that began at `start_s` have passed (inf: never)."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same."""

    bits_per_s: float

    def bits(self, start_s: float, end_s: float) -> float:
        return (end_s - start_s) * self.bits_per_s

    def done(self, start_s: float, bits: float) -> float:
        return start_s + bits / self.bits_per_s


@dataclass(frozen=True)
class Log:
    """One bandwidth log. `times_s` and `bits` are its knots, both from 0 and never falling; `latency_s` its mean
    round-trip time (None: the log does not say). `name` is where it came from.
    """

    name: str
    times_s: tuple[float, ...]
    bits: tuple[float, ...]
    latency_s: float | None = None
    slopes: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = zip(self.times_s, self.times_s[1:], self.bits, self.bits[1:], strict=False)
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
        """Bits that passed by a time within the log."""
        index = min(bisect_right(self.times_s, time_s), len(self.times_s) - 1) - 1
        return self.bits[index] + (time_s - self.times_s[index]) * self.slopes[index]

    def time_of(self, bits: float) -> float:
        """The first time at which so many bits, within the log's total, have passed."""
        index = max(bisect_left(self.bits, bits) - 1, 0)
        slope = self.slopes[min(index, len(self.slopes) - 1)]
        return self.times_s[index] + ((bits - self.bits[index]) / slope if slope else 0.0)


@dataclass(frozen=True, slots=True)
class LoopedLog:
    """A log played for ever, scaled, beginning `phase_s` into it."""

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
        goal = self._so_far(start_s) + bits / self.scale
        loops, rest = divmod(goal, total)
        if rest == 0:  # the end of a loop, not the (maybe silent) beginning of the next
            loops, rest = loops - 1, total
        return max(start_s, loops * self.log.duration_s + self.log.time_of(rest) - self.phase_s)

    def _so_far(self, time_s: float) -> float:
        loops, rest = divmod(time_s + self.phase_s, self.log.duration_s)
        return loops * self.log.bits[-1] + self.log.bits_at(rest)


def log_of_rates(name: str, durations_s: Sequence[float], rates: Sequence[float], latency_s: float | None) -> Log:
    """A log of constant pieces: so many bits a second for so long each."""
    times, bits = [0.0], [0.0]
    for duration, rate in zip(durations_s, rates, strict=True):
        times.append(times[-1] + duration)
        bits.append(bits[-1] + duration * rate)
    return Log(name, tuple(times), tuple(bits), latency_s)
