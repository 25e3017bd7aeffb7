"""`fedit`: FedAvg of A and of B."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, factors_in, named
from untether.strategies.shared_lora import Averaging, Block, Site, same_shape


class FedIT(Averaging):
    """FedIT (Zhang et al., arXiv 2305.05644).

    A' = sum p_k A_k, B' = sum p_k B_k, p_k = n_k / sum n. Not exact: the product of the means is not the mean of the
    products B_k A_k. Travels: A and B, up and down. Stays: nothing.
    """

    block = "lora"

    def begin(self, init: Factors) -> dict[str, np.ndarray]:
        return named(self.block, init)

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        down = factors_in(shared, self.block)
        same_shape(site.init, down)
        return [Block(self.block, down)]

    def averages(self, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return named(self.block, trained[self.block])

    def worn(self, shared: Arrays, site: Site) -> Factors:
        return factors_in(shared, self.block)
