"""`fedalt`: an adapter of one's own, beside the mean of everybody else's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, beside, factors_in, named, scaled
from untether.strategies.shared_lora import WEIGHT, Averaging, Block, Site, means

LATEST = "latest"
"""The round whose cohort the mean is of."""


class FedALT(Averaging):
    """FedALT (Bian et al., arXiv 2503.11880): the rest of the world, frozen, and an individual adapter.

    y = W x + (1 - m) s B_rest A_rest x + m s B_own A_own x, m = `strategy.mix`. Only the own one is trained, and never
    overwritten. A_rest = sum over j != k of n_j A_j / sum over j != k of n_j (B likewise), of the last cohort: a device
    takes itself out of the mean that comes down. The paper mixes by a trained gate of the input; here m is fixed.
    Travels: the own A and B up, the mean down. Stays: the own A and B.
    """

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        own = factors_in(site.private, "own") or site.fresh()
        rest = self._rest(shared, site)
        frozen = [Block("rest", scaled(rest, 1 - self._mix), A=False, B=False)] if rest else []
        return [*frozen, Block("own", scaled(own, self._mix))]

    def _own(self, trained: Mapping[str, Factors]) -> Factors:
        return scaled(trained["own"], 1 / self._mix)

    def averages(self, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return {**named("lora", self._own(trained)), LATEST: np.array(float(site.round))}

    def keep(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        sent = {LATEST: np.array(float(site.round)), WEIGHT: np.array(float(site.examples))}
        return {**named("own", self._own(trained)), **sent}

    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        return {**means(sums), WEIGHT: sums[WEIGHT]}

    def worn(self, shared: Arrays, site: Site) -> Factors:
        own = scaled(factors_in(site.private, "own"), self._mix)
        return beside([scaled(self._rest(shared, site), 1 - self._mix), own])

    @property
    def _mix(self) -> float:
        return self.experiment.strategy.mix

    def _rest(self, shared: Arrays, site: Site) -> Factors:
        """The mean of the others: without the device's own part, where it was in the cohort."""
        mean = factors_in(shared, "lora")
        if not mean or not site.private or round(float(shared[LATEST])) != round(float(site.private[LATEST])):
            return mean
        whole, mine = float(shared[WEIGHT]), float(site.private[WEIGHT])
        if whole - mine < 0.5:  # there was nobody else
            return {}
        own, others = factors_in(site.private, "own"), whole - mine
        return {
            target: ((whole * A - mine * own[target][0]) / others, (whole * B - mine * own[target][1]) / others)
            for target, (A, B) in mean.items()
        }
