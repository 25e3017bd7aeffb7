"""`flexlora`: products are averaged, and cut to each device's rank by SVD."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from untether.sim.rounds.messages import STACK, SUM
from untether.strategies.factors import Arrays, Factors, best, cut, factors_in, named, side_of
from untether.strategies.shared_lora import WEIGHT, Block, SharedLora, Site, stacked, weighed


class FlexLoRA(SharedLora):
    """FlexLoRA (Bai et al., arXiv 2402.11505).

    dW' = sum p_k B_k A_k, p_k = n_k / sum n; a device gets the r_k greatest singular directions of it. Exact up to the
    largest rank that there is. Travels: A and B of r_k ranks up and down. Stays: nothing.

    With `strategy.rank_weights`, the ranks between two steps of `strategy.ranks` are averaged over the devices that
    have them (raFLoRA): with plain weights, devices of few ranks dilute the upper ones, and energy gathers in the
    lowest rank that all share.
    """

    def begin(self, init: Factors) -> dict[str, np.ndarray]:
        return named("lora", init)

    def local(self, shared: Arrays, site: Site) -> list[Block]:
        return [Block("lora", self.worn(shared, site))]

    def _steps(self) -> list[tuple[int, int]]:
        """The parts of the ranks that are weighed apart, as (from, to)."""
        ranks = sorted(set(self.experiment.ranks))
        if not self.experiment.strategy.rank_weights:
            return [(0, ranks[-1])]
        return list(zip([0, *ranks], ranks, strict=False))

    def upload(self, shared: Arrays, trained: Mapping[str, Factors], site: Site) -> dict[str, np.ndarray]:
        found = weighed({}, site.examples)
        for first, last in self._steps():
            part = {t: (A[first:last], B[:, first:last]) for t, (A, B) in trained["lora"].items()}
            if site.rank > first:
                found |= stacked(f"lora{first}", part, site.examples)
                found[f"{SUM}{WEIGHT}{first}"] = np.array(float(site.examples))
        return found

    def combined(self, shared: Arrays, sums: Arrays) -> dict[str, np.ndarray]:
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for first, _ in self._steps():
            As, Bs = (side_of(sums, f"{STACK}lora{first}", side) for side in "AB")
            for target in As:
                parts.setdefault(target, []).append((As[target], Bs[target].T / sums[f"{WEIGHT}{first}"]))
        most, factors = max(self.experiment.ranks), {}
        for target, pairs in parts.items():
            A, B = np.concatenate([A for A, _ in pairs]), np.concatenate([B for _, B in pairs], axis=1)
            factors[target] = best(A, B, most)
        return {**shared, **named("lora", factors)}

    def worn(self, shared: Arrays, site: Site) -> Factors:
        return cut(factors_in(shared, "lora"), site.rank)
