"""`fedex`: FedAvg of A and B, and what that leaves out goes into the frozen part."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, beside, compact, factors_in, named, scaled
from untether.strategies.lora.fedit import FedIT
from untether.strategies.shared_lora import Block, Site, mean_product, means, stacked


class FedEx(FedIT):
    """FedEx-LoRA (Singhal et al., arXiv 2410.09432).

    A' = sum p_k A_k, B' = sum p_k B_k, and the residual sum p_k B_k A_k - B' A' is added to the frozen weights: exact.
    The residual [out, in] is kept as frozen factors of an adapter, of at most as many ranks as a layer is wide.
    Travels: A and B up; A', B' and the residual down. Stays: nothing.
    """

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        residual = factors_in(shared, "residual")
        frozen = [Block("residual", residual, A=False, B=False)] if residual else []
        return [*frozen, *super().local(shared, site)]

    def upload(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return super().upload(shared, trained, site) | stacked("lora", trained["lora"], site.examples)

    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        mean = factors_in(means(sums), "lora")
        parts = [factors_in(shared, "residual"), mean_product(sums, "lora"), scaled(mean, -1.0)]
        residual = {target: compact(A, B) for target, (A, B) in beside(parts).items()}
        return {**named("lora", mean), **named("residual", residual)}

    def worn(self, shared: Arrays, site: Site) -> Factors:
        return beside([factors_in(shared, "residual"), factors_in(shared, "lora")])
