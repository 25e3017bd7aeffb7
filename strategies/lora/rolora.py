"""`rolora`: B in one round, A in the next."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, factors_in, named
from untether.strategies.lora.fedit import FedIT
from untether.strategies.shared_lora import Block, Site, same_shape


class RoLoRA(FedIT):
    """RoLoRA (Chen et al., arXiv 2502.01755): alternating minimization.

    Even rounds: B' = sum p_k B_k over the common A; odd rounds: A' = sum p_k A_k over the common B. Exact in every
    round, since the other side is the same everywhere. Travels: the side of the round up, both down. Stays: nothing.
    """

    def sides(self, round: int) -> str:
        return "BA"[round % 2]

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        down, side = factors_in(shared, self.block), self.sides(site.round)
        same_shape(site.init, down)
        return [Block(self.block, down, A=side == "A", B=side == "B")]

    def averages(self, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return named(self.block, trained[self.block], self.sides(site.round))
