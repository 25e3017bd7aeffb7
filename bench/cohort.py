"""(c) untether: the cohort engine."""

from __future__ import annotations

from collections.abc import Sequence

from bench.measure import Outcome
from bench.workload import Workload, filters
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.generation import GenerationRow, generate
from untether.clients.engine.training import TrainJob, train
from untether.clients.filters import judge
from untether.clients.filters.embedding import Encoder
from untether.sim.core.learning import TrainSettings


def run(workload: Workload, indices: Sequence[int]) -> Outcome:
    """Filter, train and answer for the devices of one process."""
    base, devices = workload.base(), workload.load(list(indices))
    encoder = Encoder(dtype=workload.encoder, device=workload.device)
    _warm_up(base, devices, encoder)
    outcome, jobs = Outcome(), [device.job for device in devices]
    with outcome.stage("embed"):
        judged = judge(
            {d.index: d.written for d in devices}, {d.index: d.real for d in devices}, filters(), encoder
        )  # fmt: skip
    with outcome.stage("train"):
        results = train(base, jobs)
    with outcome.stage("decode"):
        stack = AdapterStack.of_states(base, [job.spec for job in jobs], [results[job.key].state for job in jobs])
        rows = [GenerationRow(p, slot) for slot, device in enumerate(devices) for p in device.prompts]
        answers = iter(generate(base, stack, rows, max_new_tokens=workload.max_new_tokens))
        outcome.answers = {device.index: [next(answers) for _ in device.prompts] for device in devices}
    outcome.verdicts = {index: [item.verdict for item in items] for index, items in judged.items()}
    outcome.losses = {key: result.losses for key, result in results.items()}
    outcome.tokens = sum(result.tokens for result in results.values())
    return outcome


def _warm_up(base, devices, encoder) -> None:
    encoder.encode(["one text", "another text"], remember=())
    first = devices[0].job
    train(base, [TrainJob(0, first.examples, TrainSettings(steps=1), first.spec, state=first.state)])
    generate(base, None, [GenerationRow(devices[0].prompts[0])], max_new_tokens=2)
