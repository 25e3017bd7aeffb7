"""The devices that every contestant simulates: users of the embedded world, as plain token ids and texts.

A device has 8 real and 24 written samples and 10 queries, of one task. Every contestant embeds the same texts, trains
on the same samples in the same batches from the same initial adapter, and answers the same queries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import DTYPES, FrozenBase
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.jobs import Example, TrainJob
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.core.records import Interaction, Sample
from untether.sim.core.seeding import derive
from untether.sim.experiment import Experiment
from untether.sim.population.tasks import get_task
from untether.sim.population.world import World

REAL, WRITTEN, QUERIES = 8, 24, 10


@dataclass(frozen=True)
class DeviceData:
    """One device: what its filter reads, what its adapter learns, what it is asked."""

    index: int
    real: tuple[Interaction, ...]
    written: tuple[Sample, ...]
    job: TrainJob
    prompts: tuple[list[int], ...]


@dataclass(frozen=True)
class Workload:
    """What to simulate. model: folder of the on-device model; dtype, device: its arithmetic in every contestant;
    encoder: the encoder's.
    """

    devices: int = 64
    task: str = "LaMP_4"
    dtype: str = "float32"
    device: str = "cpu"
    encoder: str = "auto"
    seed: int = 0
    max_new_tokens: int = 24
    settings: TrainSettings = field(default_factory=TrainSettings)
    spec: LoraSpec = field(default_factory=LoraSpec)

    @property
    def model(self) -> str:
        return resolve("embedded")

    def base(self) -> FrozenBase:
        """The on-device model, for the engine."""
        return FrozenBase.load(self.model, dtype=self.dtype, device=self.device)

    def plain_model(self) -> torch.nn.Module:
        """The on-device model, for everyone else."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=DTYPES[self.dtype])
        return model.to(self.device)

    def load(self, indices: list[int]) -> list[DeviceData]:
        """The devices of these indices."""
        return [_device(self, index) for index in indices]


@lru_cache(maxsize=1)
def _plain_base(workload: Workload) -> FrozenBase:
    workload = dataclasses.replace(workload, device="cpu")
    return FrozenBase(workload.plain_model(), transformers.AutoTokenizer.from_pretrained(workload.model), lean=False)


def _device(workload: Workload, index: int) -> DeviceData:
    base, task = _plain_base(workload), get_task(workload.task)
    user = World(workload.seed).user(
        index, tasks=(workload.task,), history=(REAL + WRITTEN, REAL + WRITTEN), queries=QUERIES
    )
    real, others = user.history[:REAL], user.history[REAL:]
    written = tuple(Sample(f"{index}-{n}", "bench", i.task, i.input, i.output, i.form) for n, i in enumerate(others))
    examples = [
        Example(
            encode_prompt(base.tokenizer, task.prompt(item.input, item.form)),
            encode_answer(base.tokenizer, item.output),
        )
        for item in user.history
    ]
    seed = derive(workload.seed, index, "adapter")
    job = TrainJob(
        index, examples, workload.settings, workload.spec, seed=derive(workload.seed, index),
        state=AdapterStack.create(base, [workload.spec], [seed]).state(0),
    )  # fmt: skip
    prompts = tuple(encode_prompt(base.tokenizer, task.prompt(query.input)) for query in user.queries)
    return DeviceData(index, real, written, job, prompts)


def filters():
    """The experiment's own filters and thresholds."""
    return Experiment().filters


def encoder_path() -> str:
    """Where the sentence encoder lies."""
    from untether.clients.filters.embedding import DEFAULT_ENCODER, locate

    return str(Path(locate(DEFAULT_ENCODER)))
