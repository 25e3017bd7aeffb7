"""The arms: one record for each treatment of a device, read by everything that plans, trains, answers, compares or
reports.

An arm is one treatment of the same device on the same data. To add one, add a record to the table: its place is its
place in every report. Other modules refer to arms only by the roles below (`METHOD`, `ALONE`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from untether.sim.core.errors import unknown

Learned = Literal["real", "accepted", "received", "others"]
"""Kinds of examples: the device's own history; the samples that its filters kept; all samples but leaks; the
histories of other users.
"""

Answering = Literal["base", "adapter", "shared", "federated", "majority", "cloud"]
"""Who answers: the base model alone, the device's own adapter on it, the shared one, what the strategy has devices
train together, the most frequent label, or the cloud model. So `answered_by` calls them in the table `predictions`.
"""

FLOOR, SHARED, FEDERATED, ALONE, METHOD, ORACLE, CLOUD = (
    "frozen", "shared", "federated", "local", "collaborative", "oracle", "cloud"
)  # fmt: skip
"""Roles: what every arm is compared with; the adapters that belong to no device; those that devices train together;
what a device learns when it needs nobody; the method that is examined; the same with a perfect cloud; the cloud model
itself.
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """An arm that another one is compared with.

    Args:
        arm: Its name.
        settles: What the comparison settles.
        words: What the other arm does instead, as it stands in a sentence.
        judged: `tested` for a difference, with Holm's correction (primary); against a `margin` (non-inferiority); or
            `reported` without either.
    """

    arm: str
    settles: str
    words: str
    judged: Literal["tested", "margin", "reported"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One treatment.

    Args:
        name: As experiments and tables call it.
        meaning: What it is, for reports.
        answers: What answers its queries.
        learns: The kinds of examples that its adapter is trained on; none where nothing is trained.
        draws: The samples of which as many are drawn at random as `accepted` has, in their stead: all that were
            `received`, `foreign` ones, accepted by one other user, or `withheld` items of the user's own, older than
            those that the device has. Empty: the accepted ones themselves.
        steps_of: The arm whose number of optimizer steps it takes; empty: its own epochs.
        adapter_of: The arm whose adapter it uses; empty: its own.
        retrieves: Whether the prompt holds items of the history.
        kinds: The kinds of task that it answers; empty: all.
        references: What it is compared with beside `FLOOR`, in reading order.
        usual: Whether it runs by default.
    """

    name: str
    meaning: str
    answers: Answering
    learns: tuple[Learned, ...] = ()
    draws: Literal["", "received", "foreign", "withheld"] = ""
    steps_of: str = ""
    adapter_of: str = ""
    retrieves: bool = False
    kinds: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    usual: bool = False

    @property
    def trains(self) -> bool:
        """Whether every device trains an adapter for it."""
        return self.answers == "adapter" and not self.adapter_of

    @property
    def adapter(self) -> str:
        """The arm whose adapter answers."""
        return self.adapter_of or self.name

    @property
    def needs_samples(self) -> bool:
        """Whether it depends on what the cloud wrote, be it by another arm's adapter or number of steps alone."""
        followed = (ARMS[name] for name in (self.steps_of, self.adapter_of) if name)
        return not {"accepted", "received"}.isdisjoint(self.learns) or any(arm.needs_samples for arm in followed)

    def answers_kind(self, kind: str) -> bool:
        """Returns whether it answers tasks of this kind."""
        return not self.kinds or kind in self.kinds


_TABLE = (
    Arm(FLOOR, "the shared base model, trained on nothing: the floor", "base", usual=True),
    Arm(
        "majority", "the history's most frequent label (classification and rating): what needs no model", "majority",
        kinds=("classification", "rating"), usual=True,
    ),
    Arm(SHARED, "one LoRA a task from disjoint users", "shared", learns=("others",)),
    Arm(
        FEDERATED, "the LoRA that devices train together on their real histories, as the strategy shares it",
        "federated", learns=("real",),
    ),
    Arm(
        "rag", "the base model with the BM25 top-k of the history in its prompt", "base", retrieves=True, usual=True
    ),
    Arm(
        "rag_adapter", "the collaborative adapter with the same retrieval", "adapter", adapter_of=METHOD, retrieves=True
    ),
    Arm(ALONE, "LoRA on the user's real history", "adapter", learns=("real",), usual=True),
    Arm(
        "local_matched", "the same, with as many optimizer steps as `collaborative`", "adapter", learns=("real",),
        steps_of=METHOD, usual=True,
    ),
    Arm("synthetic_only", "LoRA on the filtered synthetic samples", "adapter", learns=("accepted",)),
    Arm("unfiltered", "LoRA on real and all synthetic samples", "adapter", learns=("real", "received")),
    Arm(
        "unfiltered_matched", "LoRA on real and as many random synthetic samples as `collaborative` accepted",
        "adapter", learns=("real", "accepted"), draws="received", usual=True,
    ),
    Arm(
        "placebo", "LoRA on real and as many accepted samples made for one other user", "adapter",
        learns=("real", "accepted"), draws="foreign", usual=True,
    ),
    Arm(
        METHOD, "LoRA on real and filtered synthetic samples (CDCDA-PLM)", "adapter", learns=("real", "accepted"),
        references=(
            Reference(
                "local_matched", "the cloud's samples against as many steps on the user's own history",
                "training as many steps on the user's own history alone", "tested",
            ),
            Reference(
                "placebo", "samples written for this user against as many written for another",
                "as many samples written for another user", "tested",
            ),
            Reference(
                CLOUD, "the device's own adapter against asking the cloud model itself", "asking the cloud model",
                "margin",
            ),
            Reference(
                "unfiltered_matched", "filtered samples against as many unfiltered ones", "as many unfiltered samples",
                "reported",
            ),
            Reference(
                ORACLE, "the cloud's samples against real items of the same user, as a perfect cloud would write them",
                "as many real items that the device does not have", "reported",
            ),
        ),
        usual=True,
    ),
    Arm(
        ORACLE, "LoRA on real and as many withheld items of the same user: what a perfect cloud would write", "adapter",
        learns=("real", "accepted"), draws="withheld",
    ),
    Arm(CLOUD, "the cloud model answers with the history in its prompt", "cloud", usual=True),
)  # fmt: skip

ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _TABLE})
"""Every arm by its name, in the order of reports."""

CONTRASTS: Mapping[tuple[str, str], Reference] = MappingProxyType(
    {(arm.name, reference.arm): reference for arm in _TABLE for reference in arm.references}
)
"""The design's comparisons, (arm, reference), in reading order."""

PRIMARY = tuple(pair for pair, reference in CONTRASTS.items() if reference.judged == "tested")
"""Those that are tested: Holm's correction is over tasks times these, on each task's primary metric."""

NON_INFERIORITY = tuple(pair for pair, reference in CONTRASTS.items() if reference.judged == "margin")
"""Those that are judged against a margin: not worse if the interval lies above -margin."""


def check_arms(names: Iterable[str]) -> None:
    """Checks names of arms.

    Raises:
        ValueError: A name is no arm's; the message lists the arms.
    """
    for name in names:
        if name not in ARMS:
            raise ValueError(unknown("arm", name, ARMS))


def ordered(names: Iterable[str]) -> list[str]:
    """Returns each name once, in the order of reports; names of no arm, as an older run may have, come last."""
    known = set(names)
    return [name for name in ARMS if name in known] + sorted(known - set(ARMS))


def records(names: Iterable[str]) -> Iterator[Arm]:
    """Yields the records of these arms."""
    return (ARMS[name] for name in names)


def trained(names: Iterable[str]) -> list[str]:
    """Returns the arms for which devices train adapters when these are compared: their own, or one that they use."""
    needed = {arm.adapter for arm in records(names)}
    return [name for name, arm in ARMS.items() if arm.trains and name in needed]
