"""`hetlora`: devices of several ranks; the first ranks are everybody's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, cut, factors_in, named, norm, padded
from untether.strategies.shared_lora import WEIGHT, Block, SharedLora, Site, weighed

RANKS = "ranks"


class HetLoRA(SharedLora):
    """HetLoRA (Cho et al., arXiv 2401.06432).

    A device trains the first r_k ranks of the shared A and B. Rank j of A' (and of B') is the mean of rank j over the
    devices that have it, weighed by s_k = ||B_k A_k||: the paper's sparsity weights, which favour devices that learned
    something. The paper divides by the weights of all devices, so that padding with zeros shrinks the upper ranks;
    here a rank is divided by the weights of those that have it. Its pruning of a device's own rank is left out.
    Travels: r_k ranks of A and B up and down. Stays: nothing.
    """

    def begin(self, init: Factors) -> dict[str, np.ndarray]:
        return named("lora", init)

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        return [Block("lora", self.worn(shared, site))]

    def upload(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        own, most = trained["lora"], max(self.experiment.ranks)
        weight = norm(own)
        ranks = np.where(np.arange(most) < site.rank, 1.0, 0.0)
        return weighed({**named("lora", padded(own, most)), RANKS: ranks}, weight)

    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        weights, found = sums[RANKS], dict(shared)
        there = weights > 0
        for name, array in sums.items():
            if name in (WEIGHT, RANKS):
                continue
            by = weights[:, None] if "/A/" in name else weights
            mean = np.divide(array, by, where=by > 0, out=np.zeros_like(array))
            mask = there[:, None] if "/A/" in name else there
            found[name] = np.where(mask, mean, shared[name]) if name in shared else mean
        return found

    def worn(self, shared: Arrays, site: Site) -> Factors:
        return cut(factors_in(shared, "lora"), site.rank)
