"""What one adapter is to learn, and in which order: examples, settings, batches and learning rates.

A job's batches and learning rates follow from the job alone. A separate run that is given the same batches learns the
same adapter.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from untether.clients.engine.adapters import LoraSpec
from untether.sim.core.seeding import generator

_BUCKET_TOKENS = 8
"""Examples whose lengths differ by less may share a batch in any order; a batch is padded by about so much at most."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the answer to learn, as token ids; the loss is on the answer only."""

    prompt_ids: Sequence[int]
    target_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """AdamW and its schedule. `steps` overrides `epochs` where it is not 0; warm-up and decay as in `transformers`."""

    learning_rate: float = 3e-3
    epochs: float = 6.0
    steps: int = 0
    batch_size: int = 8
    schedule: str = "linear"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @classmethod
    def of(cls, section, steps: int | None = None) -> TrainSettings:
        """From an experiment's `[training]` section, or anything with the same fields; `steps` overrides its own."""
        names = ("learning_rate", "epochs", "batch_size", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm")
        return cls(**{name: getattr(section, name) for name in names}, steps=section.steps if steps is None else steps)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps on so many examples."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(examples / self.batch_size)))

    def rate_at(self, step: int, total: int) -> float:
        """Learning rate of step `step` (from 0) of `total`: transformers' constant, linear and cosine schedules."""
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return self.learning_rate * step / max(1, warmup)
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, 1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
        if self.schedule == "constant":
            return self.learning_rate
        raise ValueError(f"schedule {self.schedule!r} is none of constant, linear, cosine")


@dataclass(slots=True)
class TrainJob:
    """One adapter's training.

    seed drives the order of the examples and dropout; init_seed the fresh adapter (None: derived from seed); state is a
    PEFT state to go on from.
    """

    key: Hashable
    examples: Sequence[Example]
    settings: TrainSettings = field(default_factory=TrainSettings)
    spec: LoraSpec = field(default_factory=LoraSpec)
    seed: int = 0
    init_seed: int | None = None
    state: dict[str, Tensor] | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job."""
        return self.settings.total_steps(len(self.examples)) if self.examples else 0


def batch_plan(job: TrainJob) -> list[list[int]]:
    """Indices into job.examples for every step.

    Each epoch shuffles the examples, brings similar lengths together (within 8 tokens the shuffled order stays), cuts
    batches and shuffles those.
    """
    total, size = job.total_steps, job.settings.batch_size
    lengths = [len(example.prompt_ids) + len(example.target_ids) for example in job.examples]
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < total:
        draw = generator(job.seed, "batches", epoch)
        order = sorted(draw.permutation(len(lengths)).tolist(), key=lambda index: lengths[index] // _BUCKET_TOKENS)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        plan += [batches[index] for index in draw.permutation(len(batches))]
        epoch += 1
    return plan[:total]
