"""How a device heats up under load, slows down when it is warm, and cools: in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Heat:
    """How warm a device is, 0 (cool) to 1, and how that slows it down.

    Under load x' = (1 - x) / heating_s, else x' = -x / cooling_s (a phone cools more slowly than its chip heats).
    Below `knee` it works at full speed; above, at 1 - (1 - hot) y with y = (x - knee) / (1 - knee). As y follows the
    same law as x under load, t seconds above the knee do hot t + (1 - hot)(1 - y0) tau (1 - exp(-t / tau)) seconds of
    a cool device's work. `cooling_s` of 0: as `heating_s`.
    """

    hot_share: float
    heating_s: float
    level: float = 0.0
    knee: float = 0.0
    cooling_s: float = 0.0

    @property
    def _above(self) -> float:
        """How far above the knee, 0 to 1."""
        return max(0.0, (self.level - self.knee) / (1 - self.knee))

    @property
    def speed(self) -> float:
        """Speed now, as a share of a cool device's."""
        return 1 - (1 - self.hot_share) * self._above

    @property
    def _flat_s(self) -> float:
        """Seconds of load until it slows down."""
        return self.heating_s * math.log((1 - self.level) / (1 - self.knee)) if self.level < self.knee else 0.0

    def work_in(self, duration_s: float) -> float:
        """Seconds of cool work that `duration_s` of load gets done."""
        flat_s = self._flat_s
        if duration_s <= flat_s:
            return duration_s
        decay = -math.expm1(-(duration_s - flat_s) / self.heating_s)
        slow = self.hot_share * (duration_s - flat_s) + self._excess * self.heating_s * decay
        return flat_s + slow

    def time_for(self, work_s: float) -> float:
        """Seconds of load until `work_s` of cool work is done (Newton's method on a concave rising function)."""
        flat_s, excess = self._flat_s, self._excess
        if work_s <= flat_s or self.hot_share == 1:
            return work_s
        work_s -= flat_s
        time_s = work_s
        for _ in range(50):
            decay = math.exp(-time_s / self.heating_s)
            done_s = self.hot_share * time_s + excess * self.heating_s * (1 - decay)
            step_s = (work_s - done_s) / (self.hot_share + excess * decay)
            time_s += step_s
            if abs(step_s) <= 1e-9 * max(1.0, time_s):
                break
        return flat_s + time_s

    @property
    def _excess(self) -> float:
        return (1 - self.hot_share) * (1 - self._above)

    def after(self, load_s: float = 0.0, rest_s: float = 0.0) -> Heat:
        """Returns the state after load and then rest."""
        level = cooled(heated(self.level, load_s, self.heating_s), rest_s, self.cooling_s or self.heating_s)
        return Heat(self.hot_share, self.heating_s, level, self.knee, self.cooling_s)

    def recovery_s(self, share: float = 0.5) -> float:
        """Seconds of rest until it has won back this share of the speed that it has lost (0 if it has lost none)."""
        above = self._above * (1 - share)
        target = self.knee + above * (1 - self.knee)
        if self._above == 0 or target <= 0:
            return 0.0 if self._above == 0 else math.inf
        return (self.cooling_s or self.heating_s) * math.log(self.level / target)


def heated(level: float, load_s: float, heating_s: float) -> float:
    """Returns how warm it is after load."""
    return 1 - (1 - level) * math.exp(-load_s / heating_s)


def cooled(level: float, rest_s: float, cooling_s: float) -> float:
    """Returns how warm it is after rest."""
    return level * math.exp(-rest_s / cooling_s) if level else 0.0
