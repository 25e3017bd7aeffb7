"""What each arm trains on. An arm is one treatment of the same device on the same data (see `sim.experiment.arms`).

Nothing here depends on which other arms run: every draw comes from (seed, device, round, purpose), so adding an arm
changes no other arm's row, and an arm that accepted nothing trains exactly like `local`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from untether.sim.core.records import Interaction, Sample
from untether.sim.core.seeding import generator
from untether.sim.experiment.arms import ARMS
from untether.sim.population.tasks import get_task


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What one device can train on in one round.

    Args:
        real: Its own history.
        accepted: Synthetic samples that its filters accepted.
        unfiltered: All synthetic samples but leaks.
        foreign: Samples that one other user's filters accepted, for the placebo.
        withheld: The user's own items that are older than what the device has.
        of_second: How many of `foreign` are of a second user, for tasks of which the first has too few.
    """

    real: tuple[Interaction, ...]
    accepted: tuple[Sample, ...] = ()
    unfiltered: tuple[Sample, ...] = ()
    foreign: tuple[Sample, ...] = ()
    withheld: tuple[Interaction, ...] = ()
    of_second: int = 0


def training_pairs(arm: str, material: TrainingData, seed: int, device_id: str, round: int) -> list[tuple[str, str]]:
    """Returns the (prompt, answer) pairs that one arm of one device trains on: real items first, in history order.

    Args:
        arm: Name of the arm.
        material: What the device can train on.
        seed, device_id, round: What random draws follow from.
    """
    real: Sequence[Interaction] = material.real if "real" in ARMS[arm].learns else ()
    return [_pair(item) for item in (*real, *_synthetic(arm, material, seed, device_id, round))]


def _synthetic(
    arm: str, material: TrainingData, seed: int, device_id: str, round: int
) -> Sequence[Interaction | Sample]:
    pools: dict[str, Sequence[Interaction | Sample]] = {
        "accepted": material.accepted, "received": material.unfiltered, "foreign": material.foreign,
        "withheld": material.withheld,
    }  # fmt: skip
    if draws := ARMS[arm].draws:
        return _as_many(pools[draws], material.accepted, seed, device_id, round, arm)
    return [sample for kind in ARMS[arm].learns for sample in pools.get(kind, ())]


def _as_many(
    pool: Sequence[Interaction | Sample], like: Sequence[Sample], seed: int, device_id: str, round: int, purpose: str
) -> list[Interaction | Sample]:
    """A random draw from `pool` with as many samples of each task as `like` has (fewer where the pool has fewer)."""
    drawn: list[Interaction | Sample] = []
    for task in dict.fromkeys(sample.task for sample in like):
        wanted = sum(sample.task == task for sample in like)
        candidates = [sample for sample in pool if sample.task == task]
        order = generator(seed, device_id, round, purpose, task).permutation(len(candidates))
        drawn.extend(candidates[index] for index in sorted(order[:wanted]))
    return drawn


def _pair(item: Interaction | Sample) -> tuple[str, str]:
    return get_task(item.task).prompt(item.input, item.form), item.output
