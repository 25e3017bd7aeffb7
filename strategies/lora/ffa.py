"""`ffa`: A stays as it was drawn, B is averaged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, named, side_of
from untether.strategies.shared_lora import Averaging, Block, Site, same_shape


class FFA(Averaging):
    """FFA-LoRA (Sun et al., arXiv 2403.12313).

    B' = sum p_k B_k over one frozen A, p_k = n_k / sum n. Exact: sum p_k (B_k A) = B' A. Travels: B, up and down.
    Stays: A, which everybody draws from the seed.
    """

    def begin(self, init: Factors) -> dict[str, np.ndarray]:
        return named("lora", init, "B")

    def sides(self, round: int) -> str:
        return "B"

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        own = self.worn(shared, site)
        same_shape(site.init, own)
        return [Block("lora", own, A=False)]

    def averages(self, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return named("lora", trained["lora"], "B")

    def worn(self, shared: Arrays, site: Site) -> Factors:
        B = side_of(shared, "lora", "B")
        return {target: (A, B[target]) for target, (A, _) in site.init.items() if target in B}
