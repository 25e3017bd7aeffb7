"""The learn pass: a shard of devices trains its adapters and answers its users' queries, offline.

All devices (times arms) of a block are trained and decoded together on the one resident base model. What a device
learns depends only on its own data and on (seed, device, round): never on the block, the shard or the other arms.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from untether.clients.device.answering import SHARED, Adapter, Owner, answer, cloud_answers
from untether.clients.device.arms import Material, training_pairs
from untether.clients.device.device import Device, Shard
from untether.clients.device.ledger import ledger_rows
from untether.clients.device.materials import Materials
from untether.clients.device.scoring import error, metric_rows
from untether.clients.device.shared import shared_adapters
from untether.clients.device.worker import Worker
from untether.clients.engine.adapters import LoraSpec
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.training import Example, TrainJob, TrainResult, TrainSettings
from untether.clients.stores.adapter_cache import train_once
from untether.clients.stores.adapter_store import AdapterStore, adapter_version
from untether.sim.core.clock import DAY_S
from untether.sim.core.seeding import derive
from untether.sim.population.order import latest_s
from untether.sim.population.source import device_id
from untether.sim.rounds.material import trained, watched
from untether.sim.rounds.orders import rows as table_rows

BLOCK_ADAPTERS = 256
"""Adapters that are held together, about; the engine splits them into cohorts within its memory budget."""

TRAINING = 0.8
"""Share of the pass that training takes, for the progress display."""

LOSSES_KEPT = 16
"""Rows of `training` an adapter and round: the first step, the last and some between."""


@dataclass(frozen=True, slots=True)
class Version:
    """An adapter that may answer in this round, as the schedule has it. `kept`: under which name in the store."""

    arm: str
    round: int
    on: str
    live_s: float
    kept: str


def learn(worker: Worker, shard: Shard, order: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the pass and stages its tables. The order's tables are those of `sim.rounds.planner.Rounds.order`;
    `sample_parts` and `answer_parts` are what the passes before wrote, of all shards.

    Returns {"parts": {table: [path]}, "columns": {name: [value a device]}, "models": {name: fingerprint}}.
    """
    rows: dict[str, list[dict[str, Any]]] = {"predictions": [], "metrics": [], "training": [], "events": []}
    devices = worker.devices(shard)
    placebos: dict[int, tuple[int, int, bool]] = {}
    rows["ledger"] = ledger_rows(worker.experiment, shard, devices, order)
    versions = _versions(order)
    materials = Materials(worker, shard, order)
    store = worker.adapters(shard, order["settled"])
    shared = shared_adapters(worker, shard.seed) if SHARED in worker.experiment.arms else {}
    size = max(1, BLOCK_ADAPTERS // max(1, len(trained(worker.experiment))))
    answers = cloud_answers(worker, shard, devices, order) if "cloud" in worker.experiment.arms else []
    for start in range(0, len(devices), size):
        block = devices[start : start + size]
        report = _reporter(worker, start, len(block))
        jobs = list(_jobs(worker, shard, block, versions, materials, store, placebos))
        engine = worker.experiment.engine
        budget = int(engine.memory_gib * 2**30) or None
        results = train_once(
            worker.base, jobs, engine.cache, memory_bytes=budget, max_cohort=engine.cohort or None, progress=report
        )
        store.save(shard.round, f"{shard.name}-{start:05d}", _by_name(results))
        adapters = {**_adapters(worker, shard, block, versions, results, store), **shared}
        answers += answer(worker, shard, block, adapters, order["measured"])
        rows["training"] += _training_rows(results)
        rows["events"] += _event_rows(shard, results)
    rows["predictions"] = answers
    rows["metrics"] = [{**row, "time_s": (shard.round + 1) * DAY_S} for row in metric_rows(answers)]
    parts = {
        table: [worker.run.write_part(table, shard.seed, shard.round, f"learn-{shard.name}", found)]
        for table, found in rows.items()
    }
    trained_tokens: dict[str, int] = defaultdict(int)
    for row in rows["events"]:
        trained_tokens[row["device_id"]] += row["tokens_in"]
    columns = {
        "device": [device.index for device in devices],
        "outcome": ["ok"] * len(devices),
        "trained_tokens": [trained_tokens[device.device_id] for device in devices],
        "queries": [len(device.queries(shard.round)) for device in devices],
        **_placebo_columns([placebos.get(device.index) for device in devices]),
    }
    if worker.experiment.drift.policy == "on_drift":
        for on, arm in watched(worker.experiment).items():
            columns[f"errors.{on}"] = _errors(devices, answers, arm)
    models = {f"base {worker.experiment.model.base}": f"{worker.base.fingerprint} {worker.base.dtype}"}
    return {"parts": parts, "columns": columns, "models": models}


def _versions(order: Mapping[str, Any]) -> dict[int, list[Version]]:
    """By device, in the order in which they go live."""
    found: dict[int, list[Version]] = defaultdict(list)
    for device, *rest in table_rows(order, "versions", "device", "arm", "round", "on", "live_s", "as"):
        found[device].append(Version(*rest))
    return {device: sorted(of_device, key=lambda version: version.live_s) for device, of_device in found.items()}


def _reporter(worker: Worker, before: int, devices: int) -> Callable[[int, int], None]:
    """Optimizer steps told as devices, at most once a device."""
    told = -1.0

    def report(steps: int, total: int) -> None:
        nonlocal told
        if (done := devices * steps // max(1, total)) != told:
            told = done
            worker.progress(before + TRAINING * done)

    return report


def _jobs(
    worker: Worker, shard: Shard, block: Sequence[Device], versions: Mapping[int, Sequence[Version]],
    materials: Materials, store: AdapterStore, placebos: dict[int, tuple[int, int, bool]],
) -> Iterator[TrainJob]:  # fmt: skip
    """A training job for every adapter of the block that the schedule has trained in this round. Arms share their
    seeds: the same data gives the same adapter. `placebos` is told of each device's placebo how many samples it has,
    how many of them are of a second user, and whether both together had too few.
    """
    experiment, tokenizer = worker.experiment, worker.base.tokenizer
    for device in block:
        words = (shard.seed, device.device_id)
        for version in versions.get(device.index, ()):
            if version.round != shard.round:
                continue
            material: Material = materials.of(device, version.on)
            pairs = training_pairs(version.arm, material, *words, shard.round)
            if not pairs:
                continue
            if version.arm == "placebo" and material.accepted:
                others = len(pairs) - len(material.real)
                placebos[device.index] = others, material.of_second, others < len(material.accepted)
            lora, training = experiment.for_arm(version.arm)
            settings = TrainSettings.of(training)
            if version.arm == "local_matched":
                like = training_pairs("collaborative", material, *words, shard.round)
                steps = TrainSettings.of(experiment.for_arm("collaborative")[1]).total_steps(len(like))
                settings = TrainSettings.of(training, steps=steps)
            going_on = shard.round > 0 and training.start == "continue"
            yield TrainJob(
                key=(device.index, version),
                examples=[Example(encode_prompt(tokenizer, p), encode_answer(tokenizer, a)) for p, a in pairs],
                settings=settings,
                spec=LoraSpec.of(lora),
                seed=derive(*words, shard.round, "train"),
                init_seed=derive(*words, "adapter"),
                state=store.load(shard.round - 1, device.device_id, version.arm) if going_on else None,
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


def _by_name(results: Mapping[Any, TrainResult]) -> dict[str, dict[str, Any]]:
    """The states to keep, by the name in the store and device id."""
    grouped: dict[str, dict[str, Any]] = defaultdict(dict)
    for (index, version), result in results.items():
        grouped[version.kept][device_id(index)] = result.state
    return grouped


def _adapters(
    worker: Worker, shard: Shard, block: Sequence[Device], versions: Mapping[int, Sequence[Version]],
    results: Mapping[Any, TrainResult], store: AdapterStore,
) -> dict[Owner, list[Adapter]]:  # fmt: skip
    """Every adapter that may answer a query of this round, by its owner, in the order in which they go live."""
    adapters: dict[Owner, list[Adapter]] = defaultdict(list)
    for device in block:
        for version in versions.get(device.index, ()) if device.queries(shard.round) else ():
            trained_now = results.get((device.index, version))
            state = trained_now.state if trained_now else store.load_exactly(
                version.round, device.device_id, version.kept
            )  # fmt: skip
            if state is None:  # there was nothing to train on after all
                continue
            known = device.real_items(worker.experiment, version.round)
            spec = LoraSpec.of(worker.experiment.for_arm(version.arm)[0])
            adapters[device.index, version.arm].append(
                Adapter(spec, state, adapter_version(state), version.live_s, latest_s(known))
            )
    return adapters


def _errors(devices: Sequence[Device], answers: Sequence[Mapping[str, Any]], arm: str) -> list[str]:
    """How wrong each device's answers by one arm were, as JSON: what its user's corrections told it."""
    found: dict[str, list[float]] = {device.device_id: [] for device in devices}
    for row in answers:
        if row["arm"] == arm:
            found[row["device_id"]].append(error(row["task"], row["score"]))
    return [json.dumps(found[device.device_id]) for device in devices]


def _training_rows(results: Mapping[Any, TrainResult]) -> list[dict[str, Any]]:
    rows = []
    for (index, version), result in results.items():
        stride = max(1, -(-result.steps // (LOSSES_KEPT - 1)))
        for step in sorted({*range(0, result.steps, stride), result.steps - 1} if result.steps else ()):
            rows.append({
                "device_id": device_id(index), "arm": version.arm, "step": step, "loss": result.losses[step],
                "lr": result.learning_rates[step], "tokens": result.tokens_by_step[step],
            })  # fmt: skip
    return rows


def _event_rows(shard: Shard, results: Mapping[Any, TrainResult]) -> list[dict[str, Any]]:
    return [
        {
            "time_s": shard.round * DAY_S, "attempt": 0, "device_id": device_id(index), "arm": version.arm,
            "event_id": f"train-s{shard.seed}-r{shard.round}-{device_id(index)}-{version.arm}-{version.on}",
            "kind": "train", "outcome": result.outcome,
            "tokens_in": result.tokens, "steps": result.steps, "detail": f"{result.steps} steps",
        }
        for (index, version), result in results.items()
    ]  # fmt: skip
