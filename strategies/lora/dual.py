"""`dual`: a shared adapter and a private one beside it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.strategies.factors import Arrays, Factors, beside, factors_in, named
from untether.strategies.lora.fedit import FedIT
from untether.strategies.shared_lora import Block, Site


class Dual(FedIT):
    """Two adapters a device, as in FedDPA (Yang et al., arXiv 2403.19211) and FDLoRA (Qi et al., arXiv 2406.07925).

    y = W x + s B A x + s B_own A_own x. Both are trained at once on the device's data (FedDPA-T); the shared one is
    averaged as in `fedit`, weighed by examples. Their weights by instance (FedDPA) and by search (FDLoRA) are left
    out: both count in full. Travels: the shared A and B. Stays: the private A and B.
    """

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        own = factors_in(site.private, "own") or site.fresh()
        return [*super().local(shared, site), Block("own", own)]

    def keep(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        return named("own", trained["own"])

    def worn(self, shared: Arrays, site: Site) -> Factors:
        return beside([factors_in(shared, "lora"), factors_in(site.private, "own")])
