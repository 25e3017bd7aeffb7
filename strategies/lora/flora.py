"""`flora`: devices' adapters are stacked, rank after rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, beside, compact, factors_in, named
from untether.strategies.shared_lora import Block, SharedLora, Site, mean_product, stacked, weighed


class FLoRA(SharedLora):
    """FLoRA (Wang et al., arXiv 2409.05976): aggregation by stacking, for any ranks.

    dW' = dW + sum p_k B_k A_k, p_k = n_k / sum n: the stack of A_k and p_k B_k. Exact. Devices train a fresh adapter on
    top of what is there. Travels: A and B up, the stack down; of more ranks than a layer is wide, an equal one of that
    width. Stays: nothing.
    """

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        past = factors_in(shared, "past")
        own = Block("lora", site.fresh())
        return [Block("past", past, A=False, B=False), own] if past else [own]

    def upload(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return stacked("lora", trained["lora"], site.examples) | weighed({}, site.examples)

    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        both = beside([factors_in(shared, "past"), mean_product(sums, "lora")])
        return named("past", {target: compact(A, B) for target, (A, B) in both.items()})

    def worn(self, shared: Arrays, site: Site) -> Factors:
        return factors_in(shared, "past")
