"""AdamW with clipping for many adapters at once, each with its own learning rate, step count and history.

Adapters are rows of one matrix, so an adapter's gradient norm is a row norm and its update one call of PyTorch's own
fused kernel on a row. Adapters that share learning rate and constants go into one call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One adapter's optimizer step: its row, how many steps it took before, and its constants."""

    row: int
    steps_before: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    betas: tuple[float, float]
    eps: float


class CohortAdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter, arXiv 1711.05101) over the rows of `flat` [adapters, size]."""

    def __init__(self, flat: Tensor):
        self.flat = flat
        self._first = torch.zeros_like(flat)
        self._second = torch.zeros_like(flat)

    def reset(self, row: int) -> None:
        """Clears the moments of a row: another adapter takes it."""
        self._first[row] = 0
        self._second[row] = 0

    def step(self, updates: Sequence[OptimizerStep], grads: Sequence[Tensor]) -> Tensor:
        """Clips each update's gradient [size] in place by its own norm and updates its adapter; returns the norms."""
        device, grads = self.flat.device, list(grads)
        norms = torch.stack(torch._foreach_norm(grads))
        limits = torch.tensor([update.max_grad_norm for update in updates], dtype=norms.dtype, device=device)
        torch._foreach_mul_(grads, list((limits / (norms + 1e-6)).clamp_(max=1.0).unbind()))
        steps = torch.tensor([float(update.steps_before + 1) for update in updates], device=device).unbind()
        alike: dict[tuple, list[int]] = defaultdict(list)
        for index, update in enumerate(updates):
            alike[update.learning_rate, update.weight_decay, update.betas, update.eps].append(index)
        for (rate, decay, betas, eps), indices in alike.items():
            rows = [updates[index].row for index in indices]
            torch._fused_adamw_(
                [self.flat[row] for row in rows],
                [grads[index] for index in indices],
                [self._first[row] for row in rows],
                [self._second[row] for row in rows],
                [],
                [steps[index] for index in indices],
                lr=rate, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        return norms
