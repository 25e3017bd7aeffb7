"""`fedprox`: as `fedit`, and local training holds on to what came down."""

from __future__ import annotations

from untether.strategies.lora.fedit import FedIT


class FedProxLora(FedIT):
    """FedProx (Li et al., arXiv 1812.06127) on A and B.

    A device minimizes its loss plus mu / 2 ||w - w_shared||^2, mu = `strategy.mu`; aggregation, and what travels and
    stays, as in `fedit`.
    """

    @property
    def mu(self) -> float:
        return self.experiment.strategy.mu
