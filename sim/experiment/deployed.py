"""What an experiment may not want of devices that are real, and of those that learn nothing."""

from __future__ import annotations

from collections.abc import Sequence

from untether.sim.core.kinds import POLICIES, STRATEGIES
from untether.sim.experiment.arms import SHARED, records
from untether.sim.experiment.sections import Filters
from untether.sim.experiment.virtual_sections import Hardware, Network

NODES = "nodes"
"""The population of which the server knows nothing but what nodes tell."""


def check_deployed(
    seeds: Sequence[int], arms: Sequence[str], filters: Filters, network: Network, hardware: Hardware
) -> None:
    """Raises ValueError where real devices are wanted, and with them what only simulated ones can do."""
    if hardware.clock != "wall":
        return
    wall = 'hardware.clock = "wall"'
    if len(seeds) > 1:
        raise ValueError(f"seeds = {list(seeds)} with {wall}: real users come once. Give one seed")
    if network.kind != "always" or network.availability < 1 or network.outages or network.wifi_only:
        raise ValueError(f"[network] with {wall}: a real device has its own link. Leave the section out")
    if hardware.queries != "round_end" or hardware.train_when != "always":
        raise ValueError(f"hardware.queries, hardware.train_when with {wall}: these are simulated. Leave them out")
    others = [arm.name for arm in records(arms) if arm.draws == "foreign" or arm.name == SHARED]
    if others:
        raise ValueError(f"arms = {others} with {wall}: other users' data are on other devices. Leave these arms out")
    if "adversarial" in filters.order:
        raise ValueError(f'filters.order has "adversarial" with {wall}: it reads other users\' items. Leave it out')


def check_learners(learners: int, strategy: str, policy: str, clock: str) -> None:
    """Raises ValueError where some devices alone learn, and what the others cannot do is wanted of all."""
    for wanted, field, why in (
        (STRATEGIES.fact(strategy, "shares"), f'strategy.name = "{strategy}"', "have nothing to share"),
        (POLICIES.fact(policy, "watches"), f'drift.policy = "{policy}"', "give no answer that could be watched"),
        (clock == "wall", 'hardware.clock = "wall"', "are in virtual time alone"),
    ):
        if learners and wanted:
            raise ValueError(
                f"engine.learners = {learners} with {field}: devices that do not learn {why}. "
                "Leave engine.learners at 0"
            )
