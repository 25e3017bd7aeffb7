"""The ground truth about the world's users: how far they have changed at a time, and how they would have answered
before.

The old persona's answer distinguishes an adapter that has forgotten from one that never knew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from untether.sim.core.clock import DAY_S
from untether.sim.population.world import NOW_S, QUERY_HOUR, World, world_task


class Answers(NamedTuple):
    """A user's answers to one text: `before` any change, and at the time asked about."""

    before: str
    now: str


def query_time_s(round: int) -> float:
    """Returns when the queries of a round are asked, on the world's calendar."""
    return NOW_S + DAY_S * round + 3600 * QUERY_HOUR


def answers(world: World, user_id: str, task: str, text: str, time_s: float) -> Answers | None:
    """Returns both personas' answers to a query's text (without instruction); None where the text is not of this world.
    """
    teller = world_task(task)
    scene = teller.read(text)
    if scene is None:
        return None
    before, now = (world.persona(user_id, task, when).taste for when in (-float("inf"), time_s))
    return Answers(teller.answer(scene, before), teller.answer(scene, now))


def changed_on(world: World, user_id: str, task: str, rounds: int) -> int | None:
    """Returns the first of `rounds` rounds whose queries meet a changed persona, or None."""
    return next((r for r in range(rounds) if world.progress(user_id, task, query_time_s(r)) > 0), None)


def truth_rows(
    world: World, devices: Mapping[str, str], tasks: Sequence[str], rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of `truth.parquet` of one seed, a list a round.

    Args:
        world: The world.
        devices: User id by device id.
        tasks: The users' tasks.
        rounds: How many.
    """
    changed = {(user, task): changed_on(world, user, task, rounds) for user in devices.values() for task in tasks}
    for round in range(rounds):
        yield [
            {
                "seed": world.seed, "round": round, "device_id": device, "user_id": user, "task": task,
                "progress": world.progress(user, task, query_time_s(round)), "changed_on_round": changed[user, task],
            }
            for device, user in devices.items()
            for task in sorted(tasks)
        ]  # fmt: skip
