"""The only place that reads the real time or waits for it, so that everything else can run in virtual time."""

from __future__ import annotations

import time
from datetime import UTC, datetime

DAY_S = 86_400.0
"""Length of a round of virtual time."""


class WallClock:
    """Real time."""

    def now_s(self) -> float:
        """Seconds on a clock that never jumps; only differences mean anything."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Waits for real."""
        time.sleep(duration_s)

    def timestamp(self) -> str:
        """The date and time in UTC, ISO 8601, to the second."""
        return datetime.now(UTC).isoformat(timespec="seconds")
