"""The `shared` arm: one LoRA a task, trained on disjoint users. Personal gains must beat it or build on it."""

from __future__ import annotations

from typing import Any

from untether.clients.device.answering import SHARED, Adapter, Owner
from untether.clients.device.worker import Worker
from untether.clients.engine.adapters import LoraSpec
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.training import Example, TrainJob, TrainSettings
from untether.clients.stores.adapter_cache import train_once
from untether.clients.stores.adapter_store import AdapterStore, adapter_version
from untether.sim.core.records import Interaction
from untether.sim.core.seeding import derive
from untether.sim.population.others import shared_items
from untether.sim.population.tasks import get_task


def train_shared(worker: Worker, seed: int, part: int, parts: int) -> dict[str, Any]:
    """Trains one adapter a task on the histories of `population.shared_users` users and saves them with the run: of
    every `parts` tasks the one numbered `part`.

    What they may learn from, and what was left out, is for `sim.population.others` to say; the counts are staged as
    `left_out`, a part a task.
    """
    population = worker.population(seed)
    users = population.shared_users()
    lora, training = worker.experiment.for_arm(SHARED)
    jobs = []
    for task in list(dict.fromkeys(task for user in users for task in user.tasks))[part::parts]:
        items, left_out = shared_items(population, task, users)
        counted = [{"reason": reason, "count": count} for reason, count in left_out.items()]
        worker.run.write_part("left_out", seed, 0, f"shared-{task}", counted)
        jobs.append(TrainJob(
            key=task,
            examples=[_example(worker, item) for item in items],
            settings=TrainSettings.of(training),
            spec=LoraSpec.of(lora),
            seed=derive(seed, SHARED, task, "train"),
            init_seed=derive(seed, SHARED, task, "adapter"),
        ))
    results = train_once(
        worker.base, [job for job in jobs if job.examples], worker.experiment.engine.cache,
        progress=lambda done, total: worker.progress(len(users) / parts * done / total),
    )  # fmt: skip
    if results:
        states = {SHARED: {task: result.state for task, result in results.items()}}
        AdapterStore(worker.run.path, seed).save(0, f"tasks-{part}-of-{parts}", states)
    return {"steps": {str(task): result.steps for task, result in results.items()}}


def shared_adapters(worker: Worker, seed: int) -> dict[Owner, list[Adapter]]:
    """The shared adapters by (SHARED, task), as `train_shared` left them (none where there are no other users)."""
    store = AdapterStore(worker.run.path, seed)
    spec = LoraSpec.of(worker.experiment.for_arm(SHARED)[0])
    adapters: dict[Owner, list[Adapter]] = {}
    for task in store.devices(0, SHARED):
        state = store.load(0, task, SHARED) or {}
        adapters[SHARED, task] = [Adapter(spec, state, adapter_version(state))]
    return adapters


def _example(worker: Worker, item: Interaction) -> Example:
    tokenizer = worker.base.tokenizer
    prompt = get_task(item.task).prompt(item.input, item.form)
    return Example(encode_prompt(tokenizer, prompt), encode_answer(tokenizer, item.output))
