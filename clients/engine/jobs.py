"""Training jobs: the examples, settings, batches and learning rates of one adapter each.

A job's batches and learning rates follow from the job alone. A separate run that is given the same batches learns the
same adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.core.seeding import generator

_BUCKET_TOKENS = 8
"""Examples whose lengths differ by less may share a batch in any order; a batch is padded by about so much at most."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the answer to learn, as token ids; the loss is on the answer only."""

    prompt_ids: Sequence[int]
    target_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Trainable:
    """The trainable parts of an adapter, by rank: that row of A, and that column of B, in every target."""

    A: tuple[bool, ...]
    B: tuple[bool, ...]


@dataclass(slots=True)
class TrainJob:
    """One adapter's training.

    Args:
        key: Names its result.
        examples: What it is trained on.
        spec: The adapter's shape.
        settings: Of the optimizer and its schedule.
        seed: Draws the order of the examples and dropout.
        init_seed: Draws the fresh adapter; None: derived from `seed`.
        state: A PEFT state to continue from.
        trainable: Which of its weights are trained; None: all. The others stay as they are, weight decay included.
        proximal_mu: Weight of FedProx's term, mu / 2 times the squared distance to the initial weights.
    """

    key: Hashable
    examples: Sequence[Example]
    settings: TrainSettings = field(default_factory=TrainSettings)
    spec: LoraSpec = field(default_factory=LoraSpec)
    seed: int = 0
    init_seed: int | None = None
    state: dict[str, Tensor] | None = None
    trainable: Trainable | None = None
    proximal_mu: float = 0.0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job."""
        return self.settings.total_steps(len(self.examples))


def tokens_a_step(jobs: Sequence[TrainJob]) -> float:
    """Returns how many tokens of examples an optimizer step of these jobs reads, on average over their steps."""
    tokens, steps = 0.0, 0
    for job in jobs:
        if job.examples:
            lengths = [len(example.prompt_ids) + len(example.target_ids) for example in job.examples]
            rows = min(job.settings.batch_size, len(lengths))
            tokens += rows * sum(lengths) / len(lengths) * job.total_steps
            steps += job.total_steps
    return tokens / steps if steps else 0.0


def batch_plan(job: TrainJob) -> list[list[int]]:
    """Returns indices into job.examples for every step.

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
