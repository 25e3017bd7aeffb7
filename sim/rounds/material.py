"""What a device could train on, counted, and what training on it comes to: steps and tokens, by arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from untether.sim.core.learning import TrainSettings
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ALONE, METHOD, trained
from untether.sim.time.timeline_state import REAL, SAMPLES


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
