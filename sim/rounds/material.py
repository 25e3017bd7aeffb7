"""What a device could train on, counted, and what training on it comes to: steps and tokens, by arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from untether.sim.core.learning import TrainSettings
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ALONE, ARMS, METHOD, trained
from untether.sim.time.timeline_state import REAL, SAMPLES

Counts = tuple[tuple[int, ...], ...]
"""Of samples, by round: see `Material.plus`."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a device could train on in a round, counted: items and their tokens (about four characters each).

    `received` are all samples but leaks; `longest` the tokens of the longest example, `longest_real` of the real ones.
    """

    real: int
    real_tokens: int
    accepted: int = 0
    accepted_tokens: int = 0
    received: int = 0
    received_tokens: int = 0
    longest: int = 128
    longest_real: int = 128

    def plus(self, samples: Iterable[Sequence[int]]) -> Material:
        """Returns the material with the samples of other rounds, each (accepted, accepted tokens, received, received
        tokens).
        """
        if not (samples := tuple(samples)):
            return self
        own = (self.accepted, self.accepted_tokens, self.received, self.received_tokens)
        return replace(self, **dict(zip(SAMPLE_COUNTS, map(sum, zip(own, *samples, strict=True)), strict=True)))


SAMPLE_COUNTS = tuple(field.name for field in fields(Material))[2:6]


def watched(experiment: Experiment) -> dict[str, str]:
    """Returns the arms whose answers a device's detector of drift sees, by what those learn from that it decides for:
    the arms that need samples, or `local`. Never the arms that happen to be compared: adding one must change no other.
    """
    arms = trained(experiment.arms)
    return {on: arm for on, arm in ((SAMPLES, METHOD), (REAL, ALONE)) if arm in arms}


def total(material: Material, counted: Sequence[str]) -> tuple[int, int]:
    """Returns (items, their tokens) of the kinds counted, such as `real` and `accepted`."""
    return (
        sum(getattr(material, what) for what in counted), sum(getattr(material, f"{what}_tokens") for what in counted)
    )


def trained_tokens(training: TrainSettings, steps: int, items: int, tokens: int) -> int:
    """Tokens of so many steps, when a pass over the items takes ceil(items / batch) of them."""
    return round(steps * tokens / math.ceil(items / training.batch_size)) if items else 0


def effort(training: TrainSettings, items: int, tokens: int) -> tuple[int, int]:
    """Returns (optimizer steps, trained tokens) of items with so many tokens in all."""
    steps = training.total_steps(items)
    return steps, trained_tokens(training, steps, items, tokens)


class Takes(NamedTuple):
    """What training one adapter takes: optimizer steps and tokens on all there is, both on what there is until samples
    come, and the tokens of the longest example.
    """

    steps: int
    tokens: int
    fallback_steps: int
    fallback_tokens: int
    row_tokens: int


def takes(arm: str, training: TrainSettings, own: Material, held: Counts, stale: Counts) -> Takes:
    """Returns what an arm takes on a device's `own` material of a round.

    Args:
        arm: The arm.
        training: Its settings, or those of the arm that it takes its steps of.
        own: The material.
        held: Samples of earlier rounds that are trained on beside it (see `Material.plus`).
        stale: Those that the device falls back on until this round's come.
    """
    counted, material = ARMS[arm].learns, own.plus(held)
    items, tokens = total(material, counted)
    steps = training.total_steps(total(material, ARMS[ARMS[arm].steps_of or arm].learns)[0])
    had = replace(own, **dict.fromkeys(SAMPLE_COUNTS, 0)).plus(stale)
    longest = material.longest_real if counted == ("real",) else material.longest
    return Takes(
        steps, trained_tokens(training, steps, items, tokens), *effort(training, *total(had, counted)), longest
    )
