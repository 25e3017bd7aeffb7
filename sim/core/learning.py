"""The shape of an adapter and the settings of its training, used by the engine and by an experiment's sections. Free of
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from untether.sim.core.errors import UserError

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear map but the head."""

RateSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LoraSpec:
    """An adapter's shape. Fields mean what they mean in `peft.LoraConfig` (there: r, lora_alpha, lora_dropout)."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank}: it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout {self.dropout}: it must be at least 0 and less than 1")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))

    @classmethod
    def of(cls, section) -> LoraSpec:
        """Returns the spec in an experiment's `[lora]` section, or in anything with the same fields."""
        targets = tuple(section.target_modules)
        whole = targets[0] if targets == (ALL_LINEAR,) else targets
        return cls(section.rank, section.alpha, section.dropout, whole, section.use_rslora)

    def at_rank(self, rank: int) -> LoraSpec:
        """Returns the shape with another rank and the same scaling, as plain LoRA: of several adapters, stacked."""
        if rank == self.rank:
            return self
        return LoraSpec(rank, self.scaling * rank, self.dropout, self.target_modules)

    def fitting(self, state: Mapping[str, Any]) -> LoraSpec:
        """Returns the shape at the rank that an adapter's weights (under PEFT's keys) have."""
        return self.at_rank(next((len(array) for name, array in state.items() if ".lora_A." in name), self.rank))

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class TrainSettings:
    """AdamW and its schedule. `steps` overrides `epochs` where it is not 0; warm-up and decay as in `transformers`."""

    learning_rate: float = 3e-3
    epochs: float = 4.0
    steps: int = 0
    batch_size: int = 8
    schedule: RateSchedule = "linear"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @classmethod
    def of(cls, section, steps: int | None = None) -> TrainSettings:
        """Returns the settings in an experiment's `[training]` section, or in anything with the same fields.

        Args:
            section: The section.
            steps: Overrides the section's own steps.
        """
        names = ("learning_rate", "epochs", "batch_size", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm")
        return cls(**{name: getattr(section, name) for name in names}, steps=section.steps if steps is None else steps)

    def total_steps(self, examples: int) -> int:
        """Returns the optimizer steps on so many examples."""
        if not examples:
            return 0
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(examples / self.batch_size)))

    def rate_at(self, step: int, total: int) -> float:
        """Returns the learning rate of step `step` (from 0) of `total`, by the schedules of `transformers`.

        They are its constant, linear and cosine ones, with one more step of warm-up and in all, and without the first,
        whose rate is 0 there: no step trains nothing.
        """
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, 1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
        if self.schedule == "constant":
            return self.learning_rate
        raise ValueError(f"schedule {self.schedule!r} is none of constant, linear, cosine")
