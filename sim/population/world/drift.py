"""How users change with time: the experiment's schedule from the old persona to the new one."""

from __future__ import annotations

from untether.sim.experiment.virtual_sections import Drift


def progress(drift: Drift, days: float, phase: float) -> float:
    """Returns how far a user has changed from the old persona (0) to the new one (1).

    `gradual`: from `drift.day` on, `rate` of the way a day. `abrupt`: at once on `day`. `recurring`: back and forth,
    half a `period` in each persona, beginning on `day`.

    Args:
        drift: The experiment's section.
        days: Days after now.
        phase: The user's own, in [0, 1): delays the change by up to `jitter_days`.
    """
    since = days - drift.day - phase * drift.jitter_days
    if drift.kind == "none" or since < 0:
        return 0.0
    if drift.kind == "gradual":
        return drift.size * min(1.0, drift.rate * since)
    if drift.kind == "recurring":
        return drift.size if since % drift.period < drift.period / 2 else 0.0
    return drift.size
