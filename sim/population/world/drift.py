"""How a user changes with time: a schedule from who they were to who they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DAY_S = 86_400.0


@dataclass(frozen=True)
class Drift:
    """A schedule of change, in days after the world's `now` (negative: before it).

    `gradual`: from `day` on, `rate` of the way a day. `abrupt`: all at once at `day`. `recurring`: back and forth, half
    a `period` in each state, beginning at `day`. `size` is how far the way goes (1: into another persona), `share` how
    many of the users change at all. A user's own `phase` in [0, 1) delays it by up to `jitter_days`.
    """

    kind: Literal["none", "gradual", "abrupt", "recurring"] = "none"
    day: float = 0.0
    rate: float = 0.05
    period: float = 14.0
    size: float = 1.0
    share: float = 1.0
    jitter_days: float = 7.0

    def __post_init__(self) -> None:
        if self.kind not in ("none", "gradual", "abrupt", "recurring"):
            raise ValueError(f"drift kind {self.kind!r}: use none, gradual, abrupt or recurring")
        if not (0 <= self.size <= 1 and 0 <= self.share <= 1):
            raise ValueError(f"drift size {self.size} and share {self.share} must lie in 0 to 1")
        if self.rate <= 0 or self.period <= 0 or self.jitter_days < 0:
            raise ValueError("drift rate and period must be positive, jitter_days not negative")

    def progress(self, days: float, phase: float) -> float:
        """How far from the old persona (0) to the new one (1) a user of this `phase` is, `days` after now."""
        since = days - self.day - phase * self.jitter_days
        if self.kind == "none" or since < 0:
            return 0.0
        if self.kind == "gradual":
            return self.size * min(1.0, self.rate * since)
        if self.kind == "recurring":
            return self.size if since % self.period < self.period / 2 else 0.0
        return self.size
