"""The `shared` arm: one LoRA a task, trained on disjoint users. Personal gains must beat it or build on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from untether.clients.device.answering import LiveAdapter, Owner
from untether.clients.device.worker import Inputs, Outcome, Worker
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.jobs import tokens_a_step
from untether.clients.engine.training import Example, TrainJob
from untether.clients.stores.adapter_cache import train_once
from untether.clients.stores.adapter_store import adapter_version, as_arrays, as_tensors
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.core.records import Interaction
from untether.sim.core.seeding import derive
from untether.sim.experiment.arms import FEDERATED, SHARED
from untether.sim.population.others import shared_items
from untether.sim.population.tasks import get_task
from untether.sim.rounds.messages import Reply, Share


def train_shared(worker: Worker, order: Share, inputs: Inputs) -> Outcome:
    """Trains one adapter a task on the histories of `population.shared_users` users.

    Of every `order.parts` tasks, the one numbered `order.part` is trained. `sim.population.others` decides which items
    may be used.

    Returns:
        The reply with the adapters as arrays named `task/PEFT's key`: they are shared, so they travel with it.
    """
    population = worker.population(order.seed)
    users = population.shared_users()
    lora, training = worker.experiment.for_arm(SHARED)
    jobs, left_out = [], Counter[str]()
    for task in list(dict.fromkeys(task for user in users for task in user.tasks))[order.part :: order.parts]:
        items, excluded = shared_items(population, task, users)
        left_out.update(excluded)
        jobs.append(TrainJob(
            key=task,
            examples=[_example(worker, item) for item in items],
            settings=TrainSettings.of(training),
            spec=LoraSpec.of(lora),
            seed=derive(order.seed, SHARED, task, "train"),
            init_seed=derive(order.seed, SHARED, task, "adapter"),
        ))
    each = tokens_a_step(jobs)
    results = train_once(
        worker.base, [job for job in jobs if job.examples], worker.experiment.engine.cache,
        progress=lambda done, total: worker.progress(
            len(users) / order.parts * done / total, tokens=each * done, tokens_due=each * total
        ),
    )  # fmt: skip
    arrays = {
        f"{task}/{key}": array for task, result in results.items() for key, array in as_arrays(result.state).items()
    }
    return Outcome(Reply(facts={"left_out": dict(left_out)}, arrays=arrays))


def shared_adapters(worker: Worker, arrays: Mapping[str, np.ndarray]) -> dict[Owner, list[LiveAdapter]]:
    """Returns the shared adapters by (SHARED, task), from the arrays of `train_shared`; none if no other users exist.
    """
    spec = LoraSpec.of(worker.experiment.for_arm(SHARED)[0])
    states: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if name.startswith(f"{FEDERATED}/"):
            continue
        task, _, key = name.partition("/")
        states.setdefault(task, {})[key] = array
    return {
        (SHARED, task): [LiveAdapter(spec, as_tensors(state), adapter_version(state))] for task, state in states.items()
    }


def _example(worker: Worker, item: Interaction) -> Example:
    tokenizer = worker.base.tokenizer
    prompt = get_task(item.task).prompt(item.input, item.form)
    return Example(encode_prompt(tokenizer, prompt), encode_answer(tokenizer, item.output))
