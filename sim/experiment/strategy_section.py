"""What an experiment says of training together, and whether that holds together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from untether.sim.core.kinds import STRATEGIES
from untether.sim.experiment.arms import FEDERATED
from untether.sim.experiment.section import Section


class Strategy(Section):
    """The Flower strategy: who takes part, what is shared, how it is aggregated."""

    name: str = Field("private", description="what is shared: `private`, nothing; else see docs/sharing.md")
    aggregate: str = Field(
        "mean", description="how what is averaged is aggregated: `mean`, by examples, or a strategy of Flower by name, "
        "such as FedAdam or FedMedian"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of Flower's strategy")
    privacy: str = Field(
        "", description="Flower's wrapper for central differential privacy, such as "
        "DifferentialPrivacyServerSideFixedClipping"
    )
    privacy_options: dict[str, Any] = Field({}, description="keyword arguments of the wrapper")
    select: str = Field(
        "all", description="who takes part in a round: `all`, `random`, `available`, `stalest_first`, "
        "`least_data_first`, `within_budget`"
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="random, stalest_first, least_data_first: how many candidates (at least one)"
    )
    budget_tokens: int = Field(0, ge=0, description="within_budget: most tokens that a round trains on, in all")
    ranks: tuple[int, ...] = Field(
        (), description="ranks of devices, one drawn for each (hetlora, flexlora, flora); empty: lora.rank. Scaling is "
        "alpha / lora.rank for all"
    )
    by_task: bool = Field(False, description="devices share with those alone that have the same tasks")
    mu: float = Field(0.01, ge=0, description="fedprox: weight of the proximal term")
    mix: float = Field(0.5, gt=0, le=1, description="fedalt: weight of a device's own adapter")
    rank_weights: bool = Field(False, description="flexlora: weigh each rank over the devices that have it (raFLoRA)")

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if any(rank < 1 for rank in ranks):
            raise ValueError(f"ranks = {list(ranks)}: every rank is 1 or more")
        return ranks

    @model_validator(mode="after")
    def _consistent(self) -> Strategy:
        if self.aggregate == "mean" and (self.options or self.privacy):
            raise ValueError(
                'options and privacy are for a strategy of Flower, and aggregate = "mean". Set strategy.aggregate, to '
                '"FedAvg" for example'
            )
        if self.select == "within_budget" and not self.budget_tokens:
            raise ValueError('select = "within_budget" needs strategy.budget_tokens')
        return self


def check_sharing(strategy: Strategy, arms: Collection[str], begun: Mapping[str, str]) -> None:
    """Checks that what is shared is used, that what is used is shared, and that ranks and aggregation fit the strategy.

    Args:
        strategy: The section.
        arms: Those of the experiment.
        begun: `training.start` of the arms whose training begins with what is shared.

    Raises:
        ValueError: One of these does not hold.
    """
    name, first = strategy.name, next(iter(begun), None)
    if FEDERATED in arms or first:
        used = f"arms has {FEDERATED}" if FEDERATED in arms else f'{first} has training.start = "{begun[str(first)]}"'
        if not STRATEGIES.fact(name, "shares"):
            raise ValueError(
                f'{used}, but strategy.name = "{name}" shares nothing. Name one that does, such as "fedit"'
            )
    elif STRATEGIES.fact(name, "shares"):
        raise ValueError(
            f'strategy.name = "{name}" shares an adapter that nothing uses. Add {FEDERATED} to arms, or set '
            'training.start = "on_shared"'
        )
    if strategy.ranks and not STRATEGIES.fact(name, "ranks"):
        raise ValueError(
            f'strategy.ranks = {list(strategy.ranks)} with strategy.name = "{name}", which needs one rank for all. '
            f"Leave it empty, or take one of {_able('ranks')}"
        )
    if strategy.ranks and first:
        raise ValueError(
            f"{first} begins with what is shared, and strategy.ranks = {list(strategy.ranks)} differ by device. Leave "
            "strategy.ranks empty"
        )
    if strategy.aggregate != "mean" and not STRATEGIES.fact(name, "averages"):
        raise ValueError(
            f'strategy.aggregate = "{strategy.aggregate}" with strategy.name = "{name}", which does not average. Set '
            f'it to "mean", or take one of {_able("averages")}'
        )


def _able(fact: str) -> str:
    """The strategies of which this is true."""
    return ", ".join(name for name in STRATEGIES if STRATEGIES.fact(name, fact))
