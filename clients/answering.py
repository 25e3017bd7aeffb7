"""How devices answer their users, offline: every query, by every arm, in batches on the one resident base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clients.adapters import AdapterStack, LoraSpec
from clients.device import Device, Shard
from clients.encoding import decode_answer, encode_answer, encode_prompt
from clients.generation import GenerationRow, generate, label_scores
from clients.retrieval import Retriever
from clients.scoring import answered, prediction_row
from clients.worker import Worker
from sim.experiment import Experiment
from sim.orders import rows as table_rows
from sim.population.tasks import get_task, rag_prompt
from sim.records import Interaction, Query
from sim.seeding import derive

if TYPE_CHECKING:
    from torch import Tensor

SHARED = "shared"
RETRIEVING = ("rag", "rag_adapter")

Owner = tuple[object, str]
"""Who an adapter belongs to: (device index, arm), or (SHARED, task)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: since when it answers (virtual time), and the date of the latest item that it may have seen."""

    spec: LoraSpec
    state: Mapping[str, Tensor]
    version: str
    live_s: float | None = None
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    row: dict[str, Any]
    device: int
    query: Query
    prompt: str
    adapter: Adapter | None


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    prompt_tokens: int
    new_tokens: int


def answer(
    worker: Worker, shard: Shard, devices: Sequence[Device], adapters: Mapping[Owner, Sequence[Adapter]],
    measured: str = "{}",
) -> list[dict]:  # fmt: skip
    """Prediction rows, scored, of these devices for every arm that they answer themselves (all but `cloud`).

    Of an owner's adapters, in the order in which they go live, the newest that is live when the query comes answers:
    the last one where queries wait for the round's end. Without any the base alone answers.
    """
    timeline, rows, questions = worker.timeline(shard.seed, measured), [], []
    for device in devices:
        items = device.real_items(worker.experiment, shard.round)
        newest_s = {task: _newest_s(items, task) for task in device.user.tasks}
        for number, query, arm, prompt in _asked(worker.experiment, device, shard.round, items):
            asked_s = timeline.query_time_s(shard.round, device.index, number)
            row = prediction_row(device, query, arm, answered_by="base") | {"answered_time_s": asked_s}
            rows.append(row)
            if arm == "majority":
                row |= {"answered_by": "majority", "data_until_s": newest_s[query.task]}
                answered(row, _majority(items, query.task))
                continue
            if arm in RETRIEVING:
                row["data_until_s"] = newest_s[query.task]
            adapter = _live(worker.experiment, adapters.get(_owner(device, query, arm), ()), asked_s)
            if adapter is not None:
                row["answered_by"] = SHARED if arm == SHARED else "adapter"
                row |= {"adapter_version": adapter.version, "adapter_time_s": adapter.live_s}
                row.setdefault("data_until_s", adapter.until_s)
            questions.append(_Question(row, device.index, query, prompt, adapter))
    for question, found in zip(questions, _decode(worker, shard, questions), strict=True):
        answered(question.row, found.text)
        question.row["answered_time_s"] += timeline.answer_s(
            question.device, question.row["arm"], found.prompt_tokens, found.new_tokens
        )
    return rows


def cloud_answers(
    worker: Worker, shard: Shard, devices: Sequence[Device], order: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Prediction rows of the `cloud` arm, from what the fetch pass got: `no_answer` where nothing came back, or where
    what came never reached its device. When it came stands in the request's event.
    """
    lost = {name for (name,) in table_rows(order, "lost", "request")}
    staged = worker.run.read_rows(order["answer_parts"], [device.device_id for device in devices])
    came = {(row["device_id"], row["query_id"]): row for row in staged if row["request_id"] not in lost}
    rows = []
    for device in devices:
        items = device.real_items(worker.experiment, shard.round)
        for query in device.queries(shard.round):
            found = came.get((device.device_id, query.query_id), {"outcome": "no_answer", "text": ""})
            row = prediction_row(device, query, "cloud", answered_by="cloud")
            row["data_until_s"] = _newest_s(items, query.task)
            rows.append(answered(row, found["text"], found["outcome"]))
    return rows


def _newest_s(items: Sequence[Interaction], task: str) -> float | None:
    """The date of the latest item of a task; None where there is none."""
    return max((item.time_s for item in items if item.task == task and item.time_s is not None), default=None)


def _live(experiment: Experiment, adapters: Sequence[Adapter], time_s: float) -> Adapter | None:
    if experiment.hardware.queries == "day":
        adapters = [adapter for adapter in adapters if adapter.live_s is None or adapter.live_s <= time_s]
    return adapters[-1] if adapters else None


def _owner(device: Device, query: Query, arm: str) -> Owner:
    if arm == SHARED:
        return SHARED, query.task
    return device.index, "collaborative" if arm == "rag_adapter" else arm


def _asked(
    experiment: Experiment, device: Device, round: int, items: Sequence[Interaction]
) -> Iterable[tuple[int, Query, str, str]]:
    """(number, query, arm, prompt) for every query of a device's round and every arm that the device answers."""
    retrievers = {task: Retriever([item for item in items if item.task == task]) for task in device.user.tasks}
    for number, query in enumerate(device.queries(round)):
        task, retrieved = get_task(query.task), None
        plain = task.prompt(query.input)
        for arm in experiment.arms:
            if arm == "cloud" or (arm == "majority" and task.kind == "generation"):
                continue
            if arm not in RETRIEVING:
                yield number, query, arm, plain
                continue
            if retrieved is None:
                found = retrievers[query.task].retrieve(query.input, experiment.generation.rag_items)
                retrieved = rag_prompt(task, found, query.input)
            yield number, query, arm, retrieved


def _majority(items: Sequence[Interaction], task: str) -> str:
    """The most frequent output; among equals, the one seen last."""
    outputs = [item.output for item in items if item.task == task]
    counts = Counter(outputs)
    return max(reversed(outputs), key=counts.__getitem__) if outputs else ""


def _decode(worker: Worker, shard: Shard, questions: Sequence[_Question]) -> list[_Answer]:
    """The answer to every question: labels by likelihood where that is configured, everything else by decoding.

    Questions with the very same prompt and adapter are decoded once.
    """
    settings = worker.experiment.generation
    worn = list({id(q.adapter): q.adapter for q in questions if q.adapter is not None}.values())
    stack = AdapterStack.of_states(
        worker.base, [adapter.spec for adapter in worn], [dict(adapter.state) for adapter in worn]
    ) if worn else None  # fmt: skip
    slots = {id(adapter): number for number, adapter in enumerate(worn)}
    keys = [(slots.get(id(question.adapter)), question.prompt) for question in questions]
    unique = dict(zip(keys, questions, strict=True))
    rows = {key: GenerationRow(encode_prompt(worker.base.tokenizer, key[1]), key[0]) for key in unique}
    ranked = {
        key: row for key, row in rows.items()
        if settings.classify == "likelihood" and get_task(unique[key].query.task).labels
    }  # fmt: skip
    answers = _generated(worker, shard, stack, {k: (unique[k], row) for k, row in rows.items() if k not in ranked})
    answers |= _likeliest(worker, stack, {key: (unique[key], row) for key, row in ranked.items()})
    return [answers[key] for key in keys]


_Rows = Mapping[Any, tuple[_Question, GenerationRow]]


def _generated(worker: Worker, shard: Shard, stack: AdapterStack | None, asked: _Rows) -> dict[Any, _Answer]:
    settings, tokenizer = worker.experiment.generation, worker.base.tokenizer
    if not asked:
        return {}
    rows = [row for _, row in asked.values()]
    tokens = generate(
        worker.base, stack, rows,
        max_new_tokens=[settings.max_new_tokens or get_task(q.query.task).max_new_tokens for q, _ in asked.values()],
        temperature=settings.temperature,
        seeds=[
            derive(shard.seed, q.row["device_id"], shard.round, "decode", q.query.query_id) for q, _ in asked.values()
        ],
    )
    return {
        key: _Answer(decode_answer(tokenizer, ids), len(row.prompt_ids), len(ids))
        for key, row, ids in zip(asked, rows, tokens, strict=True)
    }


def _likeliest(worker: Worker, stack: AdapterStack | None, asked: _Rows) -> dict[Any, _Answer]:
    if not asked:
        return {}
    labels = [get_task(question.query.task).labels or () for question, _ in asked.values()]
    ids = [[encode_answer(worker.base.tokenizer, label) for label in names] for names in labels]
    rows = [row for _, row in asked.values()]
    scores = label_scores(worker.base, stack, rows, ids)
    best = [max(range(len(of_label)), key=of_label.__getitem__) for of_label in scores]
    return {
        key: _Answer(names[chosen], len(row.prompt_ids), len(of_names[chosen]))
        for key, names, of_names, row, chosen in zip(asked, labels, ids, rows, best, strict=True)
    }
