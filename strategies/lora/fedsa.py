"""`fedsa`: A is averaged, B stays private."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, named, side_of
from untether.strategies.shared_lora import Averaging, Block, Site, same_shape


class FedSA(Averaging):
    """FedSA-LoRA (Guo et al., arXiv 2410.01463).

    A' = sum p_k A_k, p_k = n_k / sum n; both sides are trained. Travels: A, up and down. Stays: each device's B. A
    device that has not taken part yet has B = 0, the base alone.
    """

    def begin(self, init: Factors) -> dict[str, np.ndarray]:
        return named("lora", init, "A")

    def sides(self, round: int) -> str:
        return "A"

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        own = self.worn(shared, site)
        same_shape(site.init, own)
        return [Block("lora", own)]

    def averages(self, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return named("lora", trained["lora"], "A")

    def keep(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return named("lora", trained["lora"], "B")

    def worn(self, shared: Arrays, site: Site) -> Factors:
        A, B = side_of(shared, "lora", "A"), side_of(site.private, "lora", "B")
        return {target: (A[target], B.get(target, zero)) for target, (_, zero) in site.init.items() if target in A}
