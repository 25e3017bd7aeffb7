"""The fetch pass: a shard of devices asks the cloud, over HTTP, and filters the samples.

The queries of the `cloud` arm are asked here too, of the same endpoint. Whether an answer reaches its device is decided
by the schedule, so the learn pass records it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from untether.clients.cloud.client import CloudClient
from untether.clients.cloud.journal import Journal
from untether.clients.cloud.records import CloudReply, CloudRequest
from untether.clients.device.augmentation import (
    asking_again,
    merge_outcomes,
    questions,
    sample_orders,
    samples_from,
    with_checks,
)
from untether.clients.device.device import Device
from untether.clients.device.worker import Inputs, Outcome, Worker, rows_of
from untether.clients.filters import Beside, create_filters, judge
from untether.clients.filters.beside import Review, decided, simulated
from untether.clients.filters.self_consistency import agreement as agreement_of
from untether.sim.core.clock import DAY_S
from untether.sim.core.learning import LoraSpec
from untether.sim.core.records import LEAK, NOT_RECEIVED, Interaction, JudgedSample, Query, Sample, User
from untether.sim.experiment.arms import CLOUD, trained
from untether.sim.population.leaks import LeakChecker
from untether.sim.population.others import shared_items
from untether.sim.population.source import FromWorld
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import estimate_tokens
from untether.sim.rounds.messages import Fetch, Order, Refilter, Reply
from untether.sim.run.reviews import ReviewFile

AGAIN = "self_consistency"
"""The score that is not made anew when answers were lost: the cloud was asked already."""

COHORT = 64
"""Devices whose samples are embedded and judged together."""

ASKING = 0.4
"""Share of the pass that asking takes, for the progress display."""


def fetch(worker: Worker, order: Fetch, inputs: Inputs) -> Outcome:
    """Carries out the fetch pass for an order's devices.

    Args:
        worker: The worker, with its encoder and cloud endpoint.
        order: Which devices ask, and which of their requests are granted.
        inputs: What the devices' store holds for them.

    Returns:
        The reply with all attempts; rows of samples with every filter's score, and of the cloud's answers to queries.
    """
    due, held = set(order.due), {row.request for row in order.held}
    devices = worker.devices(order)
    experiment = worker.experiment
    orders = {
        device.index: [
            request
            for request in (sample_orders(experiment, order, device) if device.index in due else ())
            if request.request_id not in held
        ]
        for device in devices
    }
    asked = {
        device.index: [each for each in questions(experiment, order, device) if each[0].request_id not in held]
        for device in devices
    }
    requests = [r for index in orders for r in (*orders[index], *(request for request, _ in asked[index]))]
    if requests and experiment.cloud.provider == "openai":
        _check_model(worker)
    replies = _ask(worker, requests, len(devices)) if requests else []
    candidates = {device.index: samples_from(orders[device.index], replies) for device in devices}
    by_id = {reply.request_id: reply for reply in replies}
    agreement = _ask_again(worker, order, devices, candidates, by_id)
    judged = _judge(worker, order, devices, candidates, agreement)
    tables = {
        "samples": [_sample_row(device, item) for device in devices for item in judged[device.index]],
        "answers": [
            _answer_row(device, query, by_id[request.request_id])
            for device in devices for request, query in asked[device.index]
        ],
    }  # fmt: skip
    events = [row for request in requests for row in _event_rows(order, request, by_id[request.request_id])]
    columns = _columns(devices, orders, by_id, judged)
    models = {f"cloud {reply.model}": reply.fingerprint for reply in replies if reply.model}
    return Outcome(_reply(worker, order, devices, judged, columns, models, events), tables)


def filter_again(worker: Worker, order: Refilter, inputs: Inputs) -> Outcome:
    """Filters the samples of devices again, as if the lost answers had never been written.

    A sample that is missing makes no other one a duplicate. Samples of the `lost` requests get the verdict
    `NOT_RECEIVED`.
    """
    lost = {row.request for row in order.lost}
    devices = worker.devices(order)
    by_name = {device.device_id: device.index for device in devices}
    received: dict[int, list[Sample]] = {device.index: [] for device in devices}
    agreement: dict[str, float] = {}
    missed: dict[int, list[JudgedSample]] = {device.index: [] for device in devices}
    for row in rows_of(inputs.samples):
        sample, device = Sample(*(row[name] for name in Sample.__dataclass_fields__)), by_name[row["device_id"]]
        scores = json.loads(row["scores"] or "{}")
        if AGAIN in scores:
            agreement[sample.sample_id] = scores[AGAIN]
        if sample.request_id in lost:
            missed[device].append(JudgedSample(sample, None, None, None, NOT_RECEIVED))
        else:
            received[device].append(sample)
    judged = _judge(worker, order, devices, received, agreement)
    rows = [_sample_row(device, item) for device in devices for item in (*judged[device.index], *missed[device.index])]
    columns = {"device": [device.index for device in devices], "outcome": ["ok"] * len(devices)}
    return Outcome(_reply(worker, order, devices, judged, columns, {}), {"samples": rows})


def _reply(
    worker: Worker, order: Order, devices: Sequence[Device], judged: Mapping[int, Sequence[JudgedSample]],
    columns: dict[str, list[Any]], models: dict[str, str], events: Sequence[Mapping[str, Any]] = (),
) -> Reply:  # fmt: skip
    """What goes to the server: `columns`, with what each device could train on, and what became of each attempt."""
    if any(judged.values()):
        models[f"encoder {worker.experiment.filters.encoder}"] = f"{worker.encoder.fingerprint} {worker.encoder.dtype}"
    for device in devices:
        for kind, count in _material(worker, order, device, judged[device.index]).items():
            columns.setdefault(kind, []).append(count)
    return Reply(columns, events, models=models)


def _check_model(worker: Worker) -> None:
    """Raises UserError for a model that cannot be used, before a cloud is paid for what nobody could learn from."""
    from untether.clients.engine.door.peft_format import target_names

    experiment = worker.experiment
    for arm in trained(experiment.arms):
        target_names(worker.base, LoraSpec.of(experiment.for_arm(arm)[0]))


def _ask(worker: Worker, requests: Sequence[CloudRequest], devices: int) -> list[CloudReply]:
    waiting = Counter(request.device_id for request in requests)
    owner = {request.request_id: request.device_id for request in requests}
    came: Counter[str] = Counter()
    took_s = 0.0
    worker.progress(0.0, requests=0, requests_due=len(requests), samples_due=sum(r.count for r in requests))

    def on_done(reply: CloudReply) -> None:
        nonlocal took_s
        device = owner[reply.request_id]
        waiting[device] -= 1
        if not waiting[device]:
            del waiting[device]
        came[f"cloud.{reply.outcome}"] += 1
        took_s += sum(attempt.duration_s or 0.0 for attempt in reply.attempts)
        worker.progress(ASKING * (devices - len(waiting)), requests=came.total(), cloud_s=took_s, **came)

    cloud = worker.experiment.cloud
    if (limit_s := worker.endpoint.limit_s) > cloud.timeout_s:
        cloud = cloud.model_copy(update={"timeout_s": limit_s})
    client = CloudClient(
        cloud, base_url=worker.endpoint.base_url, model=worker.endpoint.model, variant=worker.endpoint.fingerprint,
        cache=cloud.cache or worker.scratch / "answers.sqlite",
        journal=Journal(worker.scratch / "sent.jsonl"),
        api_key=None if cloud.provider == "openai" else "",  # the run's own gateway never sees the user's key
        wall=worker.experiment.hardware.clock == "wall",
    )
    return client.ask_sync(requests, on_done)


def _ask_again(
    worker: Worker, order: Order, devices: Sequence[Device], candidates: Mapping[int, Sequence[Sample]],
    replies: dict[str, CloudReply],
) -> dict[str, float]:  # fmt: skip
    """How far the cloud's second answer agrees with each sample, where a filter wants to know: by sample id. A question
    that the cloud cannot answer agrees with nothing. What it took goes into `replies`.
    """
    experiment = worker.experiment
    rules = create_filters(experiment.filters, experiment.settings).values()
    if not any(getattr(rule, "asks_again", False) for rule in rules):
        return {}
    asked = [pair for device in devices for pair in asking_again(experiment, order, device, candidates[device.index])]
    again = {reply.request_id: reply for reply in _ask(worker, [request for request, _ in asked], len(devices))}
    checks: dict[str, list[CloudReply]] = defaultdict(list)
    found = {}
    for request, sample in asked:
        reply = again[request.request_id]
        checks[sample.request_id].append(reply)
        found[sample.sample_id] = agreement_of(sample.task, sample.output, reply.text.strip()) if reply.ok else 0.0
    for request_id, theirs in checks.items():
        replies[request_id] = with_checks(replies[request_id], theirs)
    return found


def _beside(
    worker: Worker, order: Order, devices: Sequence[Device], agreement: Mapping[str, float]
) -> dict[int, Beside]:
    """What the experiment's filters are told of each device beside its texts."""
    experiment, population = worker.experiment, worker.population(order.seed)
    rules = create_filters(experiment.filters, experiment.settings).values()
    others: list[Interaction] = []
    if any(getattr(rule, "reads_others", False) for rule in rules):
        users = population.shared_users()
        tasks = dict.fromkeys(task for device in devices for task in device.user.tasks)
        others = [item for task in tasks for item in shared_items(population, task, users)[0]]
    review: Callable[[User], Review] | None = None
    if any(getattr(rule, "reviewed", False) for rule in rules):
        human = experiment.filters.human
        if human.decisions:
            review = partial(decided, ReviewFile(human.decisions))
        elif isinstance(population, FromWorld):
            review = partial(
                simulated, population.world, round=order.round, error_rate=human.error_rate, seed=order.seed
            )
    return {
        device.index: Beside(others, agreement, review(device.user) if review is not None else None)
        for device in devices
    }


def _judge(
    worker: Worker, order: Order, devices: Sequence[Device], candidates: dict[int, list[Sample]],
    agreement: Mapping[str, float],
) -> dict[int, list[JudgedSample]]:  # fmt: skip
    """Filters the devices' candidates, a cohort embedded in one pass; leaks are the evaluator's to find."""
    checkers = {device.index: LeakChecker(device.held_out(order.round)) for device in devices}
    owner = {sample.sample_id: index for index, samples in candidates.items() for sample in samples}

    def leaks(sample: Sample) -> bool:
        return checkers[owner[sample.sample_id]].is_leak(sample.task, sample.input, sample.output)

    judged: dict[int, list[JudgedSample]] = {device.index: [] for device in devices}
    beside = _beside(worker, order, devices, agreement) if owner else {}
    judging = 0
    for start in range(0, len(devices) if owner else 0, COHORT):
        worker.progress(ASKING * len(devices) + (1 - ASKING) * start, samples=judging, samples_due=len(owner))
        some = devices[start : start + COHORT]
        real = {device.index: device.real_items(worker.experiment, order.round) for device in some}
        theirs = {device.index: candidates[device.index] for device in some}
        samples = sum(map(len, theirs.values()))
        encoder = _Watched(worker, judging, samples)
        judged |= judge(theirs, real, worker.experiment.filters, encoder, leaks, worker.experiment.settings, beside)
        judging += samples
    worker.progress(len(devices), samples=judging, samples_due=len(owner))
    return judged


class _Watched:
    """The worker's encoder, which says how many of so many samples it has embedded, `before` others."""

    def __init__(self, worker: Worker, before: int, samples: int):
        self._worker, self._before, self._samples = worker, before, samples

    def encode(self, texts: Sequence[str], *, remember: Collection[str] | None = None) -> np.ndarray:
        """See `clients.filters.embedding.Encoder`."""
        worker = self._worker

        def progress(done: int, total: int) -> None:
            worker.progress(worker.work["devices"], samples=self._before + self._samples * done // max(1, total))

        return worker.encoder.encode(texts, remember=remember, progress=progress)


def _answer_row(device: Device, query: Query, reply: CloudReply) -> dict[str, Any]:
    return {
        "device_id": device.device_id, "request_id": reply.request_id, "query_id": query.query_id,
        "outcome": "ok" if reply.ok else "no_answer", "text": reply.text.strip() if reply.ok else "",
    }  # fmt: skip


def _sample_row(device: Device, item: JudgedSample) -> dict[str, Any]:
    sample = item.sample
    others = {name: score for name, score in item.extra.items() if name != "leak"}
    return {
        "sample_id": sample.sample_id, "request_id": sample.request_id, "device_id": device.device_id,
        "user_id": device.user.user_id, "task": sample.task, "form": sample.form, "input": sample.input,
        "output": sample.output, "semantic": item.semantic, "diversity": item.diversity,
        "length_ratio": item.length_ratio, "verdict": LEAK if is_leak(item) else item.verdict,
        "scores": json.dumps(others) if others else None,
    }


def is_leak(item: JudgedSample) -> bool:
    """Returns whether the evaluator found a held-out text in a sample: no arm may train on it."""
    return bool(item.extra.get("leak"))


def _event_rows(order: Order, request: CloudRequest, reply: CloudReply) -> list[dict[str, Any]]:
    """A row an attempt; the last one carries the request's own outcome."""
    rows = []
    for attempt in reply.attempts:
        last = attempt is reply.attempts[-1]
        details = [attempt.detail, attempt.model, attempt.fingerprint, "cached" if attempt.cached else ""]
        rows.append({
            "time_s": order.round * DAY_S, "event_id": f"{request.request_id}#{attempt.attempt}",
            "request_id": request.request_id, "attempt": attempt.attempt, "device_id": request.device_id,
            "arm": CLOUD if request.kind == "answer" else None,
            "kind": "answer" if request.kind == "answer" else "augment",
            "outcome": reply.outcome if last else attempt.outcome, "duration_s": attempt.duration_s,
            "bytes_up": attempt.bytes_up, "bytes_down": attempt.bytes_down, "tokens_in": attempt.tokens_in,
            "tokens_out": attempt.tokens_out, "detail": " ".join(filter(None, details)),
        })
    return rows


def _columns(
    devices: Sequence[Device],
    orders: dict[int, list[CloudRequest]],
    replies: dict[str, CloudReply],
    judged: dict[int, list[JudgedSample]],
) -> dict[str, list[Any]]:
    """What goes to the server: counts and outcomes, no text."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for device in devices:
        own = [replies[request.request_id] for request in orders[device.index]]
        columns["device"].append(device.index)
        columns["outcome"].append(merge_outcomes(own))
        columns["requests"].append(len(own))
        columns["candidates"].append(len(judged[device.index]))
        for name in ("bytes_up", "bytes_down", "tokens_in", "tokens_out"):
            columns[name].append(sum(reply.total(name) for reply in own))
    return dict(columns)


def _material(worker: Worker, order: Order, device: Device, judged: Sequence[JudgedSample]) -> dict[str, int]:
    """What the device could train on, counted (`sim.rounds.material.Material`)."""
    real = device.real_items(worker.experiment, order.round)
    kinds = {
        "real": real,
        "accepted": [item.sample for item in judged if item.accepted and not is_leak(item)],
        "received": [item.sample for item in judged if not is_leak(item)],
    }
    tokens = {kind: [_tokens(item) for item in items] for kind, items in kinds.items()}
    counts = {name: count for kind in kinds for name, count in (
        (kind, len(tokens[kind])), (f"{kind}_tokens", sum(tokens[kind]))
    )}  # fmt: skip
    longest = max(tokens["real"], default=0)
    return {**counts, "longest": max([longest, *tokens["received"]]), "longest_real": longest}


def _tokens(item: Interaction | Sample) -> int:
    return estimate_tokens(get_task(item.task).prompt(item.input, item.form) + item.output)
