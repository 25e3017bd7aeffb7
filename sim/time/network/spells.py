"""Alternating up and down spells, known in closed form, so that no simulation steps through time.

A link, a charger and an idle phone are all such spells. Whatever the kind, one question is enough: what is the state at
a time, and until when does it surely last? With rising times, the answers take constant memory.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from untether.sim.core.clock import DAY_S, HOUR_S
from untether.sim.core.seeding import derive, generator

CHUNK = 128
"""Up and down spells drawn at once."""

SIGMA = 1.0
"""Of the logarithm of a log-normal spell: half of the time falls into the longest sixth of the spells."""


MOST_PIECES = 10_000
"""Into which a spell is cut at most, before some are lost to a rhythm."""


class Spells(Protocol):
    """Up or down, in turns."""

    def at(self, time_s: float) -> tuple[bool, float]:
        """Returns (up, until): the state at `time_s`, which lasts at least until `until` > time_s (inf: for ever)."""
        ...


def next_up(spells: Spells, time_s: float, end_s: float) -> float | None:
    """Returns the first moment from `time_s` on, and before `end_s`, at which they are up, or None."""
    while time_s < end_s:
        up, until_s = spells.at(time_s)
        if up:
            return time_s
        time_s = until_s
    return None


def up_until(spells: Spells, time_s: float, end_s: float = math.inf) -> float:
    """Returns the end of the up spell around `time_s` (exact if before `end_s`); `time_s` itself if they are down."""
    now_s = time_s
    while now_s < end_s:
        up, until_s = spells.at(now_s)
        if not up:
            return now_s
        now_s = until_s
    return now_s


def ups(spells: Spells, start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
    """Yields the up spells within [start_s, end_s), cut to it."""
    while (start := next_up(spells, start_s, end_s)) is not None:
        start_s = min(up_until(spells, start, end_s), end_s)
        yield start, start_s


def seconds_up(spells: Spells, start_s: float, end_s: float) -> float:
    """Returns how many seconds they are up within [start_s, end_s)."""
    return sum(end - start for start, end in ups(spells, start_s, end_s))


class _Forever:
    def __init__(self, up: bool):
        self.up = up

    def at(self, time_s: float) -> tuple[bool, float]:
        return self.up, math.inf


ALWAYS: Spells = _Forever(True)
NEVER: Spells = _Forever(False)


class Both:
    """Up when all of several are up."""

    def __init__(self, *several: Spells):
        self.several = several

    def at(self, time_s: float) -> tuple[bool, float]:
        change = math.inf
        for spells in self.several:
            up, until = spells.at(time_s)
            if not up:  # until then, whatever the others do
                return False, until
            if until < change:
                change = until
        return True, change


def all_of(several: Sequence[Spells]) -> Spells:
    """Returns `Both`, without the spells that are always up."""
    several = [spells for spells in several if spells is not ALWAYS]
    return Both(*several) if len(several) > 1 else several[0] if several else ALWAYS


class Remembered:
    """The same spells with a cache of the last answer: a device's arms ask the same question one after another."""

    def __init__(self, spells: Spells):
        self.spells = spells
        self._since_s, self._until_s, self._up = 0.0, 0.0, False

    def at(self, time_s: float) -> tuple[bool, float]:
        if not self._since_s <= time_s < self._until_s:
            self._up, self._until_s = self.spells.at(time_s)
            self._since_s = time_s
        return self._up, self._until_s


class Windows:
    """Up (or, `inside_up=False`, down) within given [start, end) windows, in rising order and disjoint.

    They are looped if a period is given: `time_s + phase_s` is then taken modulo it.
    """

    def __init__(
        self, windows: Sequence[tuple[float, float]], inside_up: bool = True, period_s: float = math.inf,
        phase_s: float = 0.0,
    ):  # fmt: skip
        self.edges = array("d", [edge for window in windows for edge in window])
        if any(b < a for a, b in zip(self.edges, self.edges[1:], strict=False)) or (
            self.edges and (self.edges[0] < 0 or self.edges[-1] > period_s)
        ):
            raise ValueError("windows must rise, stand apart and lie within the period")
        self.inside_up, self.period_s, self.phase_s = inside_up, period_s, phase_s

    def at(self, time_s: float) -> tuple[bool, float]:
        loop = 0.0
        if self.period_s != math.inf:
            loop = math.floor((time_s + self.phase_s) / self.period_s) * self.period_s
        shift = loop - self.phase_s
        index = bisect_right(self.edges, time_s - shift)
        until = shift + (self.edges[index] if index < len(self.edges) else self.period_s)
        if until <= time_s:  # rounding at an edge
            until = math.nextafter(time_s, math.inf)
        return (index % 2 == 1) == self.inside_up, until


class Daily:
    """Up every day from about one hour to about another (past midnight if it is the smaller), for one device.

    Each day's start and end are shifted by normal draws with standard deviation `jitter_s`, from (seed, device, day,
    purpose); a device is as early or late as it usually is (half of the variance) and as it happens to be (the other).
    """

    def __init__(self, seed: int, device: str, purpose: str, hours: tuple[float, float], jitter_s: float = HOUR_S):
        self.words = (seed, device)
        self.purpose = purpose
        self.start_s = hours[0] * HOUR_S
        self.length_s = ((hours[1] - hours[0]) % 24) * HOUR_S
        self.jitter_s = jitter_s * math.sqrt(0.5)
        self._habit = self._draw("habit")
        self._days: dict[int, tuple[float, float]] = {}

    def at(self, time_s: float) -> tuple[bool, float]:
        day = math.floor(time_s / DAY_S)
        for each in (day - 1, day, day + 1, day + 2):
            start, end = self._days.get(each) or self._window(each)
            if time_s < start:
                return False, start
            if time_s < end:
                return True, end
        raise AssertionError("a window opens every day")

    def _window(self, day: int) -> tuple[float, float]:
        if len(self._days) > 8:
            self._days.clear()
        (early, short), usual_s = self._habit, day * DAY_S + self.start_s
        first, second = self._draw(day) if self.jitter_s else (0.0, 0.0)
        shift_s, end_shift_s = self.jitter_s * (early + first), self.jitter_s * (short + second)
        start = min(max(usual_s + shift_s, usual_s - DAY_S / 2), usual_s + DAY_S / 2 - 1.0)
        length = min(max(self.length_s + end_shift_s - shift_s, 0.0), DAY_S)
        self._days[day] = start, start + length
        return self._days[day]

    def _draw(self, what: object) -> tuple[float, float]:
        """Two independent standard normals (Box-Muller), each from 31 bits of one draw."""
        high, low = divmod(derive(*self.words, self.purpose, what), 2**32)
        radius, angle = math.sqrt(-2 * math.log((high + 1) / 2**31)), 2 * math.pi * low / 2**32
        return radius * math.cos(angle), radius * math.sin(angle)


def thinned(share: float, rhythm: float) -> tuple[float, float]:
    """Returns (share of time up before any spell is lost, `OnOff`'s `spared`) for a given share after the losses.

    The losses would be up for `rhythm / 2` of the base, whatever the spells' lengths, so the base is share / (1 -
    rhythm / 2). Where that leaves less than half of the time down to ordinary gaps (so many losses do not fit), the
    base stops there, and spells are spared until the mean is right: first those far from the quiet hour.

    Args:
        share: The wanted share of whole days (below 1).
        rhythm: As in `OnOff`.
    """
    most = (1 + share) / 2
    base = share / (1 - rhythm / 2)
    if base <= most:
        return base, 1.0
    low, high = max(1 - rhythm, 1e-9), 1.0  # of 1 / spared: all kept, and none spared
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if most * _kept(rhythm, middle) > share else (low, middle)
    return most, 1 / high


def _kept(rhythm: float, cut: float) -> float:
    """Mean over a day of min(1, (1 - rhythm (1 + cos angle) / 2) / cut), for a cut of at least 1 - rhythm."""
    angle = math.acos(min(1.0, max(-1.0, 2 * (1 - cut) / rhythm - 1)))  # within it of the quiet hour, spells are lost
    return (angle * (1 - rhythm / 2) - math.sin(angle) * rhythm / 2) / (math.pi * cut) + 1 - angle / math.pi


class OnOff:
    """A renewal process of up and down spells with given means, in its stationary state at time 0.

    `distribution`: exponential, constant or lognormal. `rhythm` removes up spells that start near `quiet_hour`: a share
    rhythm * (1 + cos(2 pi (hour - quiet_hour) / 24)) / 2 of them, so for spells that are short against a day the share
    of time up is that much lower, hour by hour, and `rhythm / 2` lower over all. With `spared` above 1, so many times
    as many are kept (all at most; see `thinned`). A spell longer than a mean gap is removed in pieces, equal and no
    longer than that: else a link that is hardly ever down would be so for days.

    Drawn in chunks from (seed, device, chunk, purpose). Spells that ended before `forget` are dropped.
    """

    def __init__(
        self, seed: int, device: str, mean_up_s: float, mean_down_s: float, distribution: str = "exponential",
        rhythm: float = 0.0, quiet_hour: float = 3.0, purpose: str = "link", spared: float = 1.0,
    ):  # fmt: skip
        if distribution not in ("exponential", "constant", "lognormal"):
            raise ValueError(f"unknown distribution {distribution}")
        self.words = (seed, device, purpose)
        self.means = (mean_up_s, mean_down_s)
        self.distribution, self.rhythm, self.quiet_s = distribution, rhythm, quiet_hour * HOUR_S
        self.spared = spared
        self._edges, self._from = array("d"), math.inf  # drawn when first asked

    def at(self, time_s: float) -> tuple[bool, float]:
        if time_s < self._from:
            self._restart()
        edges = self._edges
        while not edges or edges[-1] <= time_s:
            self._extend()
        index = bisect_right(edges, time_s)
        return index % 2 == 1, edges[index]

    def forget(self, before_s: float) -> None:
        """Drops the spells before a time; questions about them are still answered, by drawing from the beginning."""
        keep = bisect_right(self._edges, before_s) // 2 * 2 - 2
        if keep >= CHUNK:
            self._edges = self._edges[keep:]
            self._from = self._edges[0]

    def _restart(self) -> None:
        rng = generator(*self.words, "start")
        up_s, down_s = self.means
        up = bool(rng.random() * (up_s + down_s) < up_s)
        self._last, age_s = self._residual(rng, up_s if up else down_s)
        self._edges = array("d")  # start, end, start, end, ... of the up spells
        if up:
            edges = self._spare(rng, np.array([-age_s, self._last]))
            self._edges.extend(float(edge) for pair in edges.reshape(-1, 2).clip(0.0) if pair[1] > 0 for edge in pair)
        self._from, self._chunk, self._in_gap = 0.0, 0, not up

    def _residual(self, rng: np.random.Generator, mean_s: float) -> tuple[float, float]:
        """What is left of the spell that a random moment falls into, and how old it is: two uniform parts of a
        length-biased spell.
        """
        if self.distribution == "exponential":  # the parts of one are independent, and exponential themselves
            return float(rng.exponential(mean_s)), float(rng.exponential(mean_s))
        biased = mean_s
        if self.distribution == "lognormal":
            biased = float(rng.lognormal(math.log(mean_s) + SIGMA**2 / 2, SIGMA))
        left = float(rng.random() * biased)
        return left, biased - left

    def _lengths(self, rng: np.random.Generator, mean_s: float) -> np.ndarray:
        if self.distribution == "exponential":
            return rng.exponential(mean_s, CHUNK)
        if self.distribution == "constant":
            return np.full(CHUNK, mean_s)
        return rng.lognormal(math.log(mean_s) - SIGMA**2 / 2, SIGMA, CHUNK)

    def _spare(self, rng: np.random.Generator, edges: np.ndarray) -> np.ndarray:
        """The edges of what the rhythm leaves of up spells, given as start, end, start, end, ..."""
        if not self.rhythm:
            return edges
        starts, ends = edges[::2], edges[1::2]
        counts = np.ceil((ends - starts) / self.means[1]).clip(1, MOST_PIECES).astype(int)
        spell = np.repeat(np.arange(len(starts)), counts)
        first = np.cumsum(counts) - counts
        begins = starts[spell] + (np.arange(len(spell)) - first[spell]) * ((ends - starts) / counts)[spell]
        kept = rng.random(len(begins)) >= self._loss(begins)
        joined = np.concatenate([[False], kept[1:] & kept[:-1] & (spell[1:] == spell[:-1]), [False]])
        stops = np.append(begins[1:], 0.0)
        stops[first + counts - 1] = ends
        return np.column_stack([begins[kept & ~joined[:-1]], stops[kept & ~joined[1:]]]).ravel()

    def _loss(self, start_s: Any) -> Any:
        lost = self.rhythm * (1 + np.cos(2 * math.pi * (start_s - self.quiet_s) / DAY_S)) / 2
        return np.maximum(0.0, 1 - self.spared * (1 - lost))

    def _extend(self) -> None:
        rng = generator(*self.words, self._chunk)
        self._chunk += 1
        downs, lengths = self._lengths(rng, self.means[1]), self._lengths(rng, self.means[0])
        if self._in_gap:  # the gap around time 0 is drawn already
            downs[0], self._in_gap = 0.0, False
        edges = np.empty(2 * CHUNK)
        edges[::2], edges[1::2] = downs, lengths
        edges = self._last + np.cumsum(edges)
        self._last = float(edges[-1])
        edges = self._spare(rng, edges)
        if not len(edges):  # all lost: the gap goes on
            edges = np.array([self._last, self._last])
        self._edges.frombytes(edges.tobytes())
