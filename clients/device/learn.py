"""The learn pass: devices train their adapters and answer their users' queries, offline.

All devices (times arms) of an order are trained and decoded together on the one resident base model. What a device
learns depends only on its own data and on (seed, device, round): never on which other devices or arms are in the order.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from untether.clients.device.answering import Cut, LiveAdapter, Owner, answer, cloud_answers, questions_due
from untether.clients.device.arms import TrainingData, training_pairs
from untether.clients.device.device import Device
from untether.clients.device.ledger import ledger_rows
from untether.clients.device.materials import Materials
from untether.clients.device.scoring import error, metric_rows, train_event_rows, training_rows
from untether.clients.device.sharing.disjoint import shared_adapters
from untether.clients.device.worker import Inputs, Outcome, Worker
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.jobs import tokens_a_step
from untether.clients.engine.training import Example, TrainJob, TrainResult
from untether.clients.stores.adapter_cache import train_once
from untether.clients.stores.adapter_store import AdapterArrays, adapter_version, as_arrays, as_tensors
from untether.sim.core.kinds import POLICIES, STRATEGIES
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.core.seeding import derive
from untether.sim.experiment.arms import ARMS, CLOUD, FEDERATED, SHARED
from untether.sim.population.order import latest_s
from untether.sim.population.source import device_id
from untether.sim.rounds.material import watched
from untether.sim.rounds.messages import Learn, Reply, Version

if TYPE_CHECKING:
    from untether.strategies.factors import Factors

TRAINING = 0.8
"""Share of the pass that training takes, for the progress display."""


def learn(worker: Worker, order: Learn, inputs: Inputs) -> Outcome:
    """Carries out the learn pass for an order's devices.

    Args:
        worker: The worker, with its base model.
        order: The versions of adapters to train, and the round's schedule.
        inputs: What the devices' store holds for them: samples, and adapters to continue from.

    Returns:
        The reply with counts; trained adapters, and rows of predictions, metrics, training and uploads.
    """
    experiment, devices = worker.experiment, worker.devices(order)
    placebos: dict[int, tuple[int, int, bool]] = {}
    cut = Cut()
    versions = _by_device(order.versions)
    materials = Materials(experiment, order, inputs)
    below: Mapping[Device, Factors] = {}
    if STRATEGIES.fact(experiment.strategy.name, "shares"):
        from untether.clients.device.sharing.federated import worn  # with Flower, which no other run's workers need

        below = worn(worker, order, devices, inputs)
    jobs = list(_jobs(worker, order, devices, versions, materials, inputs, below, placebos))
    for job in jobs:
        cut.learns(job.key.device, job.examples, worker.base.context_length)
    engine = experiment.engine
    worker.progress(0.0, tokens=0, answers=0, answers_due=questions_due(experiment, order, devices))
    results = train_once(
        worker.base, jobs, engine.cache, memory_bytes=int(engine.memory_gib * 2**30) or None,
        max_cohort=engine.cohort or None, progress=_reporter(worker, len(devices), tokens_a_step(jobs)),
    )  # fmt: skip
    adapters = _adapters(worker, order, devices, versions, results, inputs)
    if SHARED in experiment.arms:
        adapters |= shared_adapters(worker, order.arrays)
    if FEDERATED in experiment.arms:
        from untether.clients.device.sharing.federated import federated_adapters

        adapters |= federated_adapters(worker, order, below)
    answers = cloud_answers(worker, order, devices, inputs) if CLOUD in experiment.arms else []
    answers += answer(worker, order, devices, adapters, cut)
    events = train_event_rows(order, results)
    ended_s = worker.timeline(order.seed, order.measured).round_end_s(order.round)
    tables = {
        "predictions": answers,
        "metrics": [{**row, "time_s": ended_s} for row in metric_rows(answers)],
        "training": training_rows(results),
        "ledger": ledger_rows(experiment, devices, order),
    }
    trained_tokens: dict[str, int] = defaultdict(int)
    for row in events:
        trained_tokens[row["device_id"]] += row["tokens_in"]
    columns = {
        "device": [device.index for device in devices],
        "outcome": ["ok"] * len(devices),
        "trained_tokens": [trained_tokens[device.device_id] for device in devices],
        "queries": [len(device.queries(order.round)) for device in devices],
        **_placebo_columns([placebos.get(device.index) for device in devices]),
        **cut.columns([device.index for device in devices]),
    }
    if POLICIES.fact(experiment.drift.policy, "watches"):
        for on, arm in watched(experiment).items():
            columns[f"errors.{on}"] = _errors(devices, answers, arm)
    models = {f"base {experiment.model.base}": f"{worker.base.fingerprint} {worker.base.arithmetic}"}
    written = {"written": {experiment.model.base: json.dumps(worker.base.written)}}
    return Outcome(Reply(columns, events, models=models, facts=written), tables, _kept(results))


def _by_device(versions: Iterable[Version]) -> dict[int, list[Version]]:
    """In the order in which they go live."""
    found: dict[int, list[Version]] = defaultdict(list)
    for version in versions:
        found[version.device].append(version)
    return {device: sorted(own, key=lambda version: version.live_s) for device, own in found.items()}


def _reporter(worker: Worker, devices: int, tokens: float) -> Callable[[int, int], None]:
    """Optimizer steps told as devices and tokens, of which a step has so many."""

    def report(steps: int, total: int) -> None:
        done = TRAINING * devices * steps / max(1, total)
        worker.progress(done, tokens=tokens * steps, tokens_due=tokens * total)

    return report


def _jobs(
    worker: Worker, order: Learn, devices: Sequence[Device], versions: Mapping[int, Sequence[Version]],
    materials: Materials, inputs: Inputs, below: Mapping[Device, Factors], placebos: dict[int, tuple[int, int, bool]],
) -> Iterator[TrainJob]:  # fmt: skip
    """A training job for every adapter that the schedule has trained in this round. Arms share their
    seeds: the same data gives the same adapter. `placebos` is told of each device's placebo how many samples it has,
    how many of them are of a second user, and whether both together had too few.
    """
    experiment, tokenizer = worker.experiment, worker.base.tokenizer

    @cache  # a user's items are in several arms
    def example(prompt: str, answer: str) -> Example:
        return Example(encode_prompt(tokenizer, prompt), encode_answer(tokenizer, answer))

    for device in devices:
        words = (order.seed, device.device_id)
        for version in versions.get(device.index, ()):
            if version.round != order.round:
                continue
            material: TrainingData = materials.of(device, version.on)
            pairs = training_pairs(version.arm, material, *words, order.round)
            if not pairs:
                continue
            if ARMS[version.arm].draws == "foreign" and material.accepted:
                others = len(pairs) - len(material.real)
                placebos[device.index] = others, material.of_second, others < len(material.accepted)
            lora, training = experiment.for_arm(version.arm)
            settings = TrainSettings.of(training)
            if like := ARMS[version.arm].steps_of:
                theirs = training_pairs(like, material, *words, order.round)
                steps = TrainSettings.of(experiment.for_arm(like)[1]).total_steps(len(theirs))
                settings = TrainSettings.of(training, steps=steps)
            spec, start = LoraSpec.of(lora), inputs.starts.get(version)
            trainable = None
            if training.needs_shared and device in below:
                from untether.clients.device.sharing.federated import beginning

                begun = beginning(worker, version.arm, below[device], derive(*words, "adapter"), start)
                spec, start, trainable = begun.spec, begun.state, begun.trainable
            yield TrainJob(
                key=version,
                examples=[example(prompt, answer) for prompt, answer in pairs],
                settings=settings,
                spec=spec,
                seed=derive(*words, order.round, "train"),
                init_seed=derive(*words, "adapter"),
                state=None if start is None else as_tensors(start),
                trainable=trainable,
            )


def _placebo_columns(placebos: Sequence[tuple[int, int, bool] | None]) -> dict[str, list[int]]:
    """How far a placebo is one other user's, to be counted."""
    found = [placebo or (0, 0, False) for placebo in placebos]
    return {
        "placebos": [int(placebo is not None) for placebo in placebos],
        "placebos_of_two": [int(of_second > 0) for _, of_second, _ in found],
        "placebos_short": [int(short) for _, _, short in found],
        "placebo_samples": [samples for samples, _, _ in found],
        "placebo_samples_of_second": [of_second for _, of_second, _ in found],
    }


def _kept(results: Mapping[Version, TrainResult]) -> dict[str, dict[str, AdapterArrays]]:
    """The adapters for the store, by the name there and device id."""
    grouped: dict[str, dict[str, AdapterArrays]] = defaultdict(dict)
    for version, result in results.items():
        grouped[version.kept][device_id(version.device)] = as_arrays(result.state)
    return grouped


def _adapters(
    worker: Worker, order: Learn, devices: Sequence[Device], versions: Mapping[int, Sequence[Version]],
    results: Mapping[Version, TrainResult], inputs: Inputs,
) -> dict[Owner, list[LiveAdapter]]:  # fmt: skip
    """Every adapter that may answer a query of this round, by its owner, in the order in which they go live."""
    adapters: dict[Owner, list[LiveAdapter]] = defaultdict(list)
    for device in devices:
        for version in versions.get(device.index, ()) if device.queries(order.round) else ():
            if version in results:
                state = results[version].state
            elif version in inputs.adapters:
                state = as_tensors(inputs.adapters[version])
            else:  # there was nothing to train on after all
                continue
            known = device.real_items(worker.experiment, version.round)
            spec = LoraSpec.of(worker.experiment.for_arm(version.arm)[0]).fitting(state)
            adapters[device.index, version.arm].append(
                LiveAdapter(spec, state, adapter_version(state), version.live_s, latest_s(known))
            )
    return adapters


def _errors(devices: Sequence[Device], answers: Sequence[Mapping[str, Any]], arm: str) -> list[str]:
    """How wrong each device's answers by one arm were, as JSON: as its user's corrections show."""
    found: dict[str, list[float]] = {device.device_id: [] for device in devices}
    for row in answers:
        if row["arm"] == arm:
            found[row["device_id"]].append(error(row["task"], row["score"]))
    return [json.dumps(found[device.device_id]) for device in devices]
