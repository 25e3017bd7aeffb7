"""The policies of `drift.policy` and their detectors: when a device asks the cloud and trains again.

A policy decides for one device at the start of a round, from what that device can know: its last training, its
spending, its link, how wrong its answers were. The first time is the same under every policy: in round `device mod
drift.stagger`, or as soon after as the policy allows. A time that brought no samples does not count: the device is due
again in the next round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pvariance
from typing import Any

from untether.sim.core.kinds import DETECTORS, POLICIES
from untether.sim.experiment.virtual_sections import Drift


@dataclass(slots=True)
class Memory:
    """A device's state for its policy: its last round, cloud tokens spent, and errors (0 to 1) since."""

    since: int | None = None
    tokens: int = 0
    errors: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PolicyCase:
    """A decision to make.

    `expected_tokens`: what asking would cost; `online`: has it a link when it would ask? `settings` are the
    experiment's tables for plug-ins.
    """

    drift: Drift
    round: int
    memory: Memory
    expected_tokens: int
    online: Callable[[], bool]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def rested(self) -> bool:
        """Whether `drift.every` rounds have passed (or it is the first time)."""
        return self.memory.since is None or self.round - self.memory.since >= self.drift.every


Policy = Callable[[PolicyCase], bool]
"""Whether the device is due."""

Detector = Callable[[Sequence[float], Drift], int | None]
"""The place in a stream of errors (0 to 1) at which they have risen; None: nowhere."""


def every(case: PolicyCase) -> bool:
    """Decides for every `drift.every` rounds."""
    return case.rested


def never(case: PolicyCase) -> bool:
    """Decides for once only."""
    return case.memory.since is None


def when_online(case: PolicyCase) -> bool:
    """Decides for every `drift.every` rounds, but only with a link: without one, nothing is trained."""
    return case.rested and case.online()


def budget(case: PolicyCase) -> bool:
    """Decides for every `drift.every` rounds, while the cost of that is left of `drift.tokens`."""
    return case.rested and case.memory.tokens + case.expected_tokens <= case.drift.tokens


def on_drift(case: PolicyCase) -> bool:
    """Decides for the rounds in which the detector finds that the device's answers have become worse."""
    return case.memory.since is None or alarm(case.drift, case.memory.errors, case.settings) is not None


# --- detectors -----------------------------------------------------------------------------------------------------

LONGEST = 200
"""Page-Hinkley: errors that a stream is expected to have between two times, for the rate of false alarms."""

TOLERANCE = 0.1
"""Page-Hinkley: a rise of the mean error by less does not matter."""

FIRST = 10
"""Page-Hinkley: errors from which the variance is estimated, together with `PRIOR` as uncertain as errors can be."""

PRIOR = 4


def alarm(
    drift: Drift, errors: Sequence[float], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> int | None:
    """Returns where the detector of `drift.detector` finds that errors have risen, or None.

    Args:
        drift: The experiment's section.
        errors: 0 to 1, in order.
        settings: The experiment's tables for plug-ins.

    Raises:
        UserError: The detector is unknown.
    """
    detector: Detector = DETECTORS.bind(drift.detector, settings or {})
    return detector(errors, drift)


def adwin(errors: Sequence[float], drift: Drift) -> int | None:
    """Detects a rise by ADWIN (Bifet and Gavalda, SDM 2007): its `delta` bounds the chance of a false alarm.

    It finds changes both ways; only a rise counts.
    """
    from river.drift import ADWIN  # with scikit-learn and SciPy: more than all else that a run starts with

    detector = ADWIN(delta=drift.false_alarms, clock=1, min_window_length=5, grace_period=10)
    before = 0.0
    for place, error in enumerate(errors):
        detector.update(error)
        if detector.drift_detected and detector.estimation > before:
            return place
        before = detector.estimation
    return None


def page_hinkley(errors: Sequence[float], drift: Drift) -> int | None:
    """Detects a rise by Page-Hinkley (Page, Biometrika 1954), as sensitive as the stream's own variance allows.

    A walk that falls by `TOLERANCE` a step, with that variance, rises by `threshold` with a chance of at most exp(-2
    TOLERANCE threshold / variance) from each of `LONGEST` starts (Lundberg's bound for a Gaussian walk).
    """
    from river.drift import PageHinkley

    if len(errors) < FIRST:
        return None
    variance = (FIRST * pvariance(errors[:FIRST]) + PRIOR * 0.25) / (FIRST + PRIOR)
    threshold = variance * math.log(LONGEST / drift.false_alarms) / (2 * TOLERANCE)
    detector = PageHinkley(min_instances=FIRST, delta=TOLERANCE, threshold=threshold, alpha=1.0, mode="up")
    for place, error in enumerate(errors):
        detector.update(error)
        if detector.drift_detected:
            return place
    return None


# --- a fleet -------------------------------------------------------------------------------------------------------


class Policies:
    """The policy of a seed's fleet, with the states of its devices.

    Args:
        drift: The experiment's section.
        state: What an earlier one's `state()` returned.
        settings: The experiment's tables for plug-ins.
    """

    def __init__(
        self, drift: Drift, state: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ):  # fmt: skip
        self.drift, self.settings = drift, settings or {}
        self._decide: Policy = POLICIES.bind(drift.policy, self.settings)
        self._memories = {int(device): Memory(*kept) for device, kept in (state or {}).items()}

    def due(self, round: int, device: int, expected_tokens: int, online: Callable[[], bool]) -> bool:
        """Returns whether the device asks and trains in this round."""
        memory = self._memories.get(device) or Memory()
        if memory.since is None and round < device % self.drift.stagger:
            return False
        return self._decide(PolicyCase(self.drift, round, memory, expected_tokens, online, self.settings))

    def served(self, round: int, device: int, tokens: int, done: bool) -> None:
        """Records the result of a device that was due: tokens spent, and whether samples came (or none were asked for).
        """
        memory = self._memories.setdefault(device, Memory())
        memory.tokens += tokens
        if done:
            memory.since, memory.errors = round, []

    def observe(self, device: int, errors: Iterable[float]) -> None:
        """Records how wrong a device's answers were in a round, in order (0: right, 1: entirely wrong)."""
        if POLICIES.fact(self.drift.policy, "watches"):
            self._memories.setdefault(device, Memory()).errors.extend(errors)

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs (JSON)."""
        return {str(device): [m.since, m.tokens, m.errors] for device, m in self._memories.items()}
