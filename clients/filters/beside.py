"""What some filters are told beside a device's texts: other users' samples, what the cloud says when it is asked
again, what a person decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from untether.sim.core.records import Interaction, Sample, User
from untether.sim.core.seeding import generator
from untether.sim.population.world import World
from untether.sim.population.world.truth import answers, query_time_s
from untether.sim.run.reviews import ACCEPT, REJECT, Reviewed, ReviewFile

Review = Callable[[Sample], bool | None]
"""What a person decided on a sample: accepted, rejected, or (None) nothing."""


@dataclass(frozen=True)
class Beside:
    """`others`: real samples of users who are in no comparison. `agreement`: by sample id, how far the cloud's second
    answer agrees with its first, 0 to 1. `review`: a person's decisions.
    """

    others: Sequence[Interaction] = ()
    agreement: Mapping[str, float] = field(default_factory=dict)
    review: Review | None = None


def decided(reviews: ReviewFile, user: User) -> Review:
    """Returns the decisions of `untether review` on a user's samples."""

    def review(sample: Sample) -> bool | None:
        said = reviews.decision(Reviewed(user.user_id, sample.task, sample.input, sample.output))
        return {ACCEPT: True, REJECT: False}.get(said or "")

    return review


def simulated(world: World, user: User, round: int, error_rate: float, seed: int) -> Review:
    """Returns the world's user at the review: accepts what they would have answered themself, of a text that is not a
    copy of one of theirs; wrong in a share `error_rate` of the samples, drawn by text.
    """
    own = {item.input for item in user.history}

    def review(sample: Sample) -> bool | None:
        found = answers(world, user.user_id, sample.task, sample.input, query_time_s(round))
        right = found is not None and found.now.strip() == sample.output.strip() and sample.input not in own
        slips = generator(seed, user.user_id, sample.task, sample.input, sample.output, "review").random() < error_rate
        return right != slips

    return review
