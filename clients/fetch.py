"""The fetch pass: a shard of devices asks the cloud, over HTTP, and filters what comes back.

Also where the `cloud` arm's queries are asked, of the same endpoint. Whether the answers reach their device is for the
schedule to say, so the learn pass records them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clients.arms import NEED_SAMPLES
from clients.augmentation import answer_request, merge_outcomes, samples_from, samples_requests
from clients.cloud_client import CloudClient
from clients.cloud_records import CloudReply, CloudRequest
from clients.device import Device, Shard
from clients.filters import judge
from clients.worker import Worker
from sim.clock import DAY_S
from sim.leaks import LeakChecker
from sim.orders import rows as table_rows
from sim.population.tasks import get_task
from sim.protocol import estimate_tokens
from sim.records import Interaction, JudgedSample, Query, Sample

COHORT = 64
"""Devices whose samples are embedded and judged together."""

ASKING = 0.4
"""Share of the pass that asking takes, for the progress display."""


def fetch(worker: Worker, shard: Shard, order: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the pass and stages its tables: samples with every filter's score, attempts, the privacy ledger, and the
    cloud's answers to queries. Devices that are `due` ask for samples; requests that are `held` are not made. Returns
    columns a device and the parts written.
    """
    due, held = set(order["due"]), {name for (name,) in table_rows(order, "held", "request")}
    devices = worker.devices(shard)
    orders = {
        device.index: _made(_orders(worker, shard, device), held) if device.index in due else [] for device in devices
    }
    questions = {device.index: _questions(worker, shard, device, held) for device in devices}
    requests = [r for index in orders for r in (*orders[index], *(request for request, _ in questions[index]))]
    replies = _ask(worker, shard, requests, len(devices)) if requests else []
    candidates = {device.index: samples_from(orders[device.index], replies) for device in devices}
    judged = _judge(worker, shard, devices, candidates)
    by_id = {reply.request_id: reply for reply in replies}
    tables = {
        "samples": [_sample_row(device, item) for device in devices for item in judged[device.index]],
        "events": [row for request in requests for row in _event_rows(shard, request, by_id[request.request_id])],
        "ledger": [row for request in requests for row in _ledger_rows(shard, request, by_id[request.request_id])],
        "answers": [
            _answer_row(device, query, by_id[request.request_id])
            for device in devices for request, query in questions[device.index]
        ],
    }  # fmt: skip
    parts = {
        table: [worker.run.write_part(table, shard.seed, shard.round, f"fetch-{shard.name}", found)]
        for table, found in tables.items()
    }
    models = {f"cloud {reply.model}": reply.fingerprint for reply in replies if reply.model}
    if judged and any(judged.values()):
        models[f"encoder {worker.experiment.filters.encoder}"] = f"{worker.encoder.fingerprint} {worker.encoder.dtype}"
    columns = _columns(devices, orders, by_id, judged)
    for device in devices:
        for name, count in _material(worker, shard, device, judged[device.index]).items():
            columns.setdefault(name, []).append(count)
    return {"parts": parts, "columns": columns, "models": models}


def _made(requests: Sequence[CloudRequest], held: Collection[str]) -> list[CloudRequest]:
    return [request for request in requests if request.request_id not in held]


def _orders(worker: Worker, shard: Shard, device: Device) -> list[CloudRequest]:
    """The requests for synthetic samples of one device: per task, from what it knows by this round."""
    experiment, cloud = worker.experiment, worker.experiment.cloud
    if not cloud.samples or not NEED_SAMPLES.intersection(experiment.arms):
        return []
    items = device.real_items(experiment, shard.round)
    return [
        request
        for task in device.user.tasks
        for request in samples_requests(
            get_task(task), [item for item in items if item.task == task], cloud.samples,
            request_id=f"s{shard.seed}-r{shard.round}-{device.device_id}-{task}", device_id=device.device_id,
            seed=shard.seed, round=shard.round, samples_per_request=cloud.samples_per_request,
            show_items=cloud.show_items, show_chars=cloud.show_chars,
        )
    ]


def _questions(
    worker: Worker, shard: Shard, device: Device, held: Collection[str]
) -> list[tuple[CloudRequest, Query]]:
    """The cloud arm's requests: every query of the round with the history in its prompt."""
    experiment, cloud = worker.experiment, worker.experiment.cloud
    if "cloud" not in experiment.arms:
        return []
    items = device.real_items(experiment, shard.round)
    asked = [
        (
            answer_request(
                get_task(query.task), [item for item in items if item.task == query.task], query.input, query.query_id,
                request_id=f"s{shard.seed}-r{shard.round}-{device.device_id}-{query.task}-q{number}",
                device_id=device.device_id, seed=shard.seed, round=shard.round, show_items=cloud.show_items,
                show_chars=cloud.show_chars,
            ),
            query,
        )
        for number, query in enumerate(device.queries(shard.round))
    ]
    return [(request, query) for request, query in asked if request.request_id not in held]


def _ask(worker: Worker, shard: Shard, requests: Sequence[CloudRequest], devices: int) -> list[CloudReply]:
    waiting = Counter(request.device_id for request in requests)
    owner = {request.request_id: request.device_id for request in requests}

    def on_done(reply: CloudReply) -> None:
        device = owner[reply.request_id]
        waiting[device] -= 1
        if not waiting[device]:
            del waiting[device]
            worker.progress(ASKING * (devices - len(waiting)))

    cloud = worker.experiment.cloud
    client = CloudClient(
        cloud, base_url=worker.endpoint.base_url, model=worker.endpoint.model, variant=worker.endpoint.fingerprint,
        cache=cloud.cache or worker.run.path / "state" / "answers.sqlite",
        api_key=None if cloud.provider == "openai" else "",  # the run's own gateway never sees the user's key
    )
    return client.ask_sync(requests, on_done)


def _judge(
    worker: Worker, shard: Shard, devices: Sequence[Device], candidates: dict[int, list[Sample]]
) -> dict[int, list[JudgedSample]]:
    """Filters the devices' candidates, a cohort embedded in one pass; leaks are the evaluator's to find."""
    checkers = {device.index: LeakChecker(device.held_out(shard.round)) for device in devices}
    owner = {sample.sample_id: index for index, samples in candidates.items() for sample in samples}

    def leaks(sample: Sample) -> bool:
        return checkers[owner[sample.sample_id]].is_leak(sample.task, sample.input, sample.output)

    judged: dict[int, list[JudgedSample]] = {device.index: [] for device in devices}
    for start in range(0, len(devices) if owner else 0, COHORT):
        worker.progress(ASKING * len(devices) + (1 - ASKING) * start)
        some = devices[start : start + COHORT]
        real = {device.index: device.real_items(worker.experiment, shard.round) for device in some}
        theirs = {device.index: candidates[device.index] for device in some}
        judged |= judge(theirs, real, worker.experiment.filters, worker.encoder, leaks)
    return judged


def _answer_row(device: Device, query: Query, reply: CloudReply) -> dict[str, Any]:
    return {
        "device_id": device.device_id, "request_id": reply.request_id, "query_id": query.query_id,
        "outcome": "ok" if reply.ok else "no_answer", "text": reply.text.strip() if reply.ok else "",
    }  # fmt: skip


def _sample_row(device: Device, item: JudgedSample) -> dict[str, Any]:
    sample = item.sample
    return {
        "sample_id": sample.sample_id, "request_id": sample.request_id, "device_id": device.device_id,
        "user_id": device.user.user_id, "task": sample.task, "form": sample.form, "input": sample.input,
        "output": sample.output, "semantic": item.semantic, "diversity": item.diversity,
        "length_ratio": item.length_ratio, "verdict": "rejected_by:leak" if is_leak(item) else item.verdict,
    }


def is_leak(item: JudgedSample) -> bool:
    """Whether the evaluator found a held-out text in it: no arm may learn from it."""
    return bool(item.extra.get("leak"))


def _event_rows(shard: Shard, request: CloudRequest, reply: CloudReply) -> list[dict[str, Any]]:
    """A row an attempt; the last one carries the request's own outcome."""
    rows = []
    for attempt in reply.attempts:
        last = attempt is reply.attempts[-1]
        details = [attempt.detail, attempt.model, attempt.fingerprint, "cached" if attempt.cached else ""]
        rows.append({
            "time_s": shard.round * DAY_S, "event_id": f"{request.request_id}#{attempt.attempt}",
            "request_id": request.request_id, "attempt": attempt.attempt, "device_id": request.device_id,
            "arm": "cloud" if request.kind == "answer" else None,
            "kind": "answer" if request.kind == "answer" else "augment",
            "outcome": reply.outcome if last else attempt.outcome, "duration_s": attempt.duration_s,
            "bytes_up": attempt.bytes_up, "bytes_down": attempt.bytes_down, "tokens_in": attempt.tokens_in,
            "tokens_out": attempt.tokens_out, "detail": " ".join(filter(None, details)),
        })
    return rows


def _ledger_rows(shard: Shard, request: CloudRequest, reply: CloudReply) -> list[dict[str, Any]]:
    """What the messages of a request carried, item by item; a retry uploads it again."""
    times = max(1, sum(not attempt.cached for attempt in reply.attempts))
    return [
        {
            "time_s": shard.round * DAY_S, "device_id": request.device_id, "request_id": request.request_id,
            "item_id": item.item_id, "chars": item.chars * times, "tokens": -(-item.chars // 4) * times, "masked": 0,
        }
        for item in request.uploaded
    ]


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


def _material(worker: Worker, shard: Shard, device: Device, judged: Sequence[JudgedSample]) -> dict[str, int]:
    """What the device could train on, counted (`sim.rounds.Material`)."""
    real = device.real_items(worker.experiment, shard.round)
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
