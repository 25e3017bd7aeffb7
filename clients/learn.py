"""The learn pass: a shard of devices trains its adapters and answers its users' queries, offline.

All devices (times arms) of a block are trained and decoded together on the one resident base model. What a device
learns depends only on its own data and on (seed, device, round): never on the block, the shard or the other arms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from clients.adapter_cache import train_once
from clients.adapter_store import AdapterStore, adapter_version
from clients.adapters import LoraSpec
from clients.answering import Adapter, Owner, answer
from clients.arms import Material, trained_arms, training_pairs
from clients.device import Device, Shard
from clients.encoding import encode_answer, encode_prompt
from clients.scoring import metric_rows
from clients.shared import shared_adapters
from clients.training import Example, TrainJob, TrainResult, TrainSettings
from clients.worker import Worker
from sim.clock import DAY_S
from sim.leaks import LeakChecker
from sim.population.source import device_id
from sim.records import Sample
from sim.seeding import derive

BLOCK_ADAPTERS = 256
"""Adapters that are held together, about; the engine splits them into cohorts within its memory budget."""

TRAINING = 0.8
"""Share of the pass that training takes, for the progress display."""

LOSSES_KEPT = 16
"""Rows of `training` an adapter and round: the first step, the last and some between."""


def learn(worker: Worker, shard: Shard, sample_parts: Sequence[str]) -> dict[str, Any]:
    """Runs the pass and stages its tables; `sample_parts` are the round's samples, of all shards (for the placebo).

    Returns {"parts": {table: [path]}, "columns": {name: [value a device]}, "models": {name: fingerprint}}.
    """
    rows: dict[str, list[dict[str, Any]]] = {"predictions": [], "metrics": [], "training": [], "events": []}
    devices = worker.devices(shard)
    materials = _materials(worker, shard, devices, sample_parts)
    store = AdapterStore(worker.run.path, shard.seed)
    store.prune(shard.round - 1)  # the round before is committed
    shared = shared_adapters(worker, shard.seed) if "shared" in worker.experiment.arms else {}
    size = max(1, BLOCK_ADAPTERS // max(1, len(trained_arms(worker.experiment))))
    for start in range(0, len(devices), size):
        block = devices[start : start + size]
        report = _reporter(worker, start, len(block))
        jobs = list(_jobs(worker, shard, block, materials, store))
        engine = worker.experiment.engine
        budget = int(engine.memory_gib * 2**30) or None
        results = train_once(
            worker.base, jobs, engine.cache, memory_bytes=budget, max_cohort=engine.cohort or None, progress=report
        )
        store.save(shard.round, f"{shard.name}-{start:05d}", _by_arm(results))
        adapters: dict[Owner, Adapter] = {
            job.key: Adapter(job.spec, results[job.key].state, adapter_version(results[job.key].state)) for job in jobs
        }
        answers = answer(worker, shard, block, {**adapters, **shared})
        rows["predictions"] += answers
        rows["metrics"] += metric_rows(answers)
        rows["training"] += _training_rows(results)
        rows["events"] += _event_rows(shard, results)
    parts = {
        table: [worker.run.write_part(table, shard.seed, shard.round, f"learn-{shard.name}", found)]
        for table, found in rows.items()
    }
    trained: dict[str, int] = defaultdict(int)
    for row in rows["events"]:
        trained[row["device_id"]] += row["tokens_in"]
    columns = {
        "device": [device.index for device in devices],
        "outcome": ["ok"] * len(devices),
        "trained_tokens": [trained[device.device_id] for device in devices],
        "queries": [len(device.user.queries) for device in devices],
    }
    models = {f"base {worker.experiment.model.base}": f"{worker.base.fingerprint} {worker.base.dtype}"}
    return {"parts": parts, "columns": columns, "models": models}


def _reporter(worker: Worker, before: int, devices: int) -> Callable[[int, int], None]:
    """Optimizer steps told as devices, at most once a device."""
    told = -1.0

    def report(steps: int, total: int) -> None:
        nonlocal told
        if (done := devices * steps // max(1, total)) != told:
            told = done
            worker.progress(before + TRAINING * done)

    return report


def _materials(
    worker: Worker, shard: Shard, devices: Sequence[Device], sample_parts: Sequence[str]
) -> dict[int, Material]:
    """Each device's own data and samples and, for the placebo, the accepted samples of the next three devices."""
    total = len(worker.population(shard.seed))
    placebo = "placebo" in worker.experiment.arms
    donors = {
        device.index: [(device.index + k) % total for k in (1, 2, 3) if (device.index + k) % total != device.index]
        if placebo else []
        for device in devices
    }  # fmt: skip
    wanted = {*donors, *(donor for several in donors.values() for donor in several)}
    accepted, unfiltered = _read_samples(worker, sample_parts, [device_id(index) for index in sorted(wanted)])
    return {
        device.index: Material(
            real=device.real_items(worker.experiment),
            accepted=tuple(accepted[device.device_id]),
            unfiltered=tuple(unfiltered[device.device_id]),
            foreign=tuple(_harmless(device, [s for donor in donors[device.index] for s in accepted[device_id(donor)]])),
        )
        for device in devices
    }


def _harmless(device: Device, samples: Sequence[Sample]) -> list[Sample]:
    """Foreign samples without leaks of this device's own queries (they were checked against their owner's)."""
    checker = LeakChecker(device.user.queries) if samples else None
    return [s for s in samples if checker and not checker.is_leak(s.task, s.input, s.output)]


def _read_samples(
    worker: Worker, parts: Sequence[str], devices: Sequence[str]
) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """By device id: the accepted samples, and all but the leaks."""
    names = ["sample_id", "request_id", "task", "input", "output", "form"]
    accepted: dict[str, list[Sample]] = defaultdict(list)
    unfiltered: dict[str, list[Sample]] = defaultdict(list)
    for part in sorted(parts):
        table = pq.read_table(
            worker.run.path / part, columns=[*names, "device_id", "verdict"],
            filters=[("device_id", "in", list(devices))],
        )
        for row in table.to_pylist():
            sample = Sample(*(row[name] for name in names))
            if row["verdict"] == "accepted":
                accepted[row["device_id"]].append(sample)
            if row["verdict"] != "rejected_by:leak":
                unfiltered[row["device_id"]].append(sample)
    return accepted, unfiltered


def _jobs(
    worker: Worker, shard: Shard, block: Sequence[Device], materials: Mapping[int, Material], store: AdapterStore
) -> Iterator[TrainJob]:
    """A training job for every arm of every device that has something to train on. Arms share their seeds: the same
    data gives the same adapter.
    """
    experiment, tokenizer = worker.experiment, worker.base.tokenizer
    for device in block:
        material, words = materials[device.index], (shard.seed, device.device_id)
        for arm in trained_arms(experiment):
            pairs = training_pairs(arm, material, *words, shard.round)
            if not pairs:
                continue
            lora, training = experiment.for_arm(arm)
            settings = TrainSettings.of(training)
            if arm == "local_matched":
                like = training_pairs("collaborative", material, *words, shard.round)
                steps = TrainSettings.of(experiment.for_arm("collaborative")[1]).total_steps(len(like))
                settings = TrainSettings.of(training, steps=steps)
            going_on = shard.round > 0 and training.start == "continue"
            yield TrainJob(
                key=(device.index, arm),
                examples=[Example(encode_prompt(tokenizer, p), encode_answer(tokenizer, a)) for p, a in pairs],
                settings=settings,
                spec=LoraSpec.of(lora),
                seed=derive(*words, shard.round, "train"),
                init_seed=derive(*words, "adapter"),
                state=store.load(shard.round - 1, device.device_id, arm) if going_on else None,
            )


def _by_arm(results: Mapping[Any, TrainResult]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, dict[str, Any]] = defaultdict(dict)
    for (index, arm), result in results.items():
        grouped[arm][device_id(index)] = result.state
    return grouped


def _training_rows(results: Mapping[Any, TrainResult]) -> list[dict[str, Any]]:
    rows = []
    for (index, arm), result in results.items():
        stride = max(1, -(-result.steps // (LOSSES_KEPT - 1)))
        for step in sorted({*range(0, result.steps, stride), result.steps - 1} if result.steps else ()):
            rows.append({
                "device_id": device_id(index), "arm": arm, "step": step, "loss": result.losses[step],
                "lr": result.learning_rates[step], "tokens": sum(result.tokens_by_step[: step + 1]),
            })  # fmt: skip
    return rows


def _event_rows(shard: Shard, results: Mapping[Any, TrainResult]) -> list[dict[str, Any]]:
    return [
        {
            "time_s": shard.round * DAY_S, "event_id": f"train-s{shard.seed}-r{shard.round}-{device_id(index)}-{arm}",
            "attempt": 0, "device_id": device_id(index), "arm": arm, "kind": "train", "outcome": result.outcome,
            "tokens_in": result.tokens, "detail": f"{result.steps} steps",
        }
        for (index, arm), result in results.items()
    ]  # fmt: skip
