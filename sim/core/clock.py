"""Time: one interface for virtual and real clocks.

This is the only module that reads the real time or waits for it, so that everything else can run in virtual time.
Virtual time is seconds since midnight before a run's first round.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

DAY_S = 86_400.0
"""Length of a round of virtual time."""

HOUR_S = 3_600.0


class Clock(Protocol):
    """What code that waits needs of a clock, virtual or real."""

    def now_s(self) -> float:
        """Returns seconds on a clock that never jumps back; only differences have a meaning."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Returns when `duration_s` seconds of this clock have passed."""
        ...

    def timestamp(self) -> str:
        """Returns the date and time as text."""
        ...


class WallClock:
    """Real time."""

    def now_s(self) -> float:
        """Returns seconds on a clock that never jumps; only differences have a meaning."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Waits for real."""
        time.sleep(duration_s)

    def epoch_s(self) -> float:
        """Returns the seconds since 1970, which all machines count alike, about."""
        return time.time()

    def timestamp(self) -> str:
        """Returns the date and time in UTC, ISO 8601, to the second."""
        return datetime.now(UTC).isoformat(timespec="seconds")


class VirtualClock:
    """Simulated time: waiting costs nothing and is exact."""

    def __init__(self, now_s: float = 0.0):
        self._now_s = now_s

    def now_s(self) -> float:
        """Returns the virtual time in seconds."""
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        """Advances the clock.

        Raises:
            ValueError: The duration is negative.
        """
        if not duration_s >= 0:
            raise ValueError(f"cannot wait {duration_s} s")
        self._now_s += duration_s

    def timestamp(self) -> str:
        """Returns the day (from 1) and time of day, such as `day 2 06:30:00`."""
        day, second = divmod(int(self._now_s), int(DAY_S))
        return f"day {day + 1} {second // 3600:02d}:{second % 3600 // 60:02d}:{second % 60:02d}"


_UNIT_S = {"s": 1.0, "m": 60.0, "h": HOUR_S, "d": DAY_S}
_LENGTH = r"(\d+(?:\.\d+)?)([smhd])"
_SPAN = re.compile(rf"{_LENGTH}\+{_LENGTH}(?::(?:(\d+(?:\.\d+)?)%|(\d+)(?:-(\d+))?))?")


@dataclass(frozen=True, slots=True)
class Span:
    """A period of a run, [start_s, end_s), for a random share of the devices or for those numbered first to last."""

    start_s: float
    end_s: float
    share: float = 1.0
    first: int | None = None
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> Span:
        """Reads `36h+6h` (from hour 36, for 6 hours), `36h+6h:25%`, `36h+6h:0-99` or `36h+6h:7`.

        Raises:
            ValueError: The text has another form; the message names the text and the rule.
        """
        match = _SPAN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"`{text}`: write start+length, such as 36h+6h, 36h+6h:25% or 36h+6h:0-99 (s, m, h, d)")
        start, unit, length, length_unit, percent, first, last = match.groups()
        start_s = float(start) * _UNIT_S[unit]
        end_s = start_s + float(length) * _UNIT_S[length_unit]
        share = float(percent) / 100 if percent else 1.0
        numbers = None if first is None else (int(first), int(last or first))
        if end_s <= start_s or share > 1 or (numbers and numbers[1] < numbers[0]):
            raise ValueError(f"`{text}`: needs a length above 0, at most 100%, and devices in rising order")
        return cls(start_s, end_s, share, *(numbers or ()))

    @property
    def everybody(self) -> bool:
        """Whether it concerns every device."""
        return self.share == 1 and self.first is None
