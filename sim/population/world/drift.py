"""How a user changes with time: the experiment's schedule from who they were to who they become."""

from __future__ import annotations

from untether.sim.experiment.virtual_sections import Drift

DAY_S = 86_400.0


def progress(drift: Drift, days: float, phase: float) -> float:
    """How far from the old persona (0) to the new one (1) a user of this `phase` in [0, 1) is, `days` after now.

    `gradual`: from `drift.day` on, `rate` of the way a day. `abrupt`: all at once on `day`. `recurring`: back and
    forth, half a `period` in each persona, beginning on `day`. A user's `phase` delays it by up to `jitter_days`.
    """
    since = days - drift.day - phase * drift.jitter_days
    if drift.kind == "none" or since < 0:
        return 0.0
    if drift.kind == "gradual":
        return drift.size * min(1.0, drift.rate * since)
    if drift.kind == "recurring":
        return drift.size if since % drift.period < drift.period / 2 else 0.0
    return drift.size
