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
from sim.population.tasks import get_task, rag_prompt
from sim.records import Interaction, Query
from sim.seeding import derive

if TYPE_CHECKING:
    from torch import Tensor

Owner = tuple[object, str]
"""Who an adapter belongs to: (device index, arm), or ("shared", task)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter as it stands when queries are answered."""

    spec: LoraSpec
    state: Mapping[str, Tensor]
    version: str


@dataclass(frozen=True, slots=True)
class _Question:
    row: dict[str, Any]
    query: Query
    prompt: str
    slot: int | None


def answer(worker: Worker, shard: Shard, devices: Sequence[Device], adapters: Mapping[Owner, Adapter]) -> list[dict]:
    """Prediction rows, scored, of these devices for every arm that they answer themselves (all but `cloud`).

    An arm whose adapter does not exist (nothing to train on) is answered by the base alone.
    """
    owners = list(adapters)
    stack = AdapterStack.of_states(
        worker.base, [adapters[owner].spec for owner in owners], [dict(adapters[owner].state) for owner in owners]
    ) if owners else None  # fmt: skip
    slots = {owner: number for number, owner in enumerate(owners)}
    rows, questions = [], []
    for device in devices:
        items = device.real_items(worker.experiment, shard.round)
        for query, arm, prompt in _asked(worker.experiment, device, shard.round, items):
            row = prediction_row(device, query, arm, answered_by="base")
            rows.append(row)
            if arm == "majority":
                row["answered_by"] = "majority"
                answered(row, _majority(items, query.task))
                continue
            owner = _owner(device, query, arm)
            if owner in adapters:
                row["answered_by"] = "shared" if arm == "shared" else "adapter"
                row["adapter_version"] = adapters[owner].version
            questions.append(_Question(row, query, prompt, slots.get(owner)))
    for question, text in zip(questions, _decode(worker, shard, stack, questions), strict=True):
        answered(question.row, text)
    return rows


def _owner(device: Device, query: Query, arm: str) -> Owner:
    if arm == "shared":
        return "shared", query.task
    return device.index, "collaborative" if arm == "rag_adapter" else arm


def _asked(
    experiment: Experiment, device: Device, round: int, items: Sequence[Interaction]
) -> Iterable[tuple[Query, str, str]]:
    """(query, arm, prompt) for every query of a device's round and every arm that the device itself answers."""
    retrievers = {task: Retriever([item for item in items if item.task == task]) for task in device.user.tasks}
    for query in device.queries(round):
        task, retrieved = get_task(query.task), None
        plain = task.prompt(query.input)
        for arm in experiment.arms:
            if arm == "cloud" or (arm == "majority" and task.kind == "generation"):
                continue
            if arm not in ("rag", "rag_adapter"):
                yield query, arm, plain
                continue
            if retrieved is None:
                found = retrievers[query.task].retrieve(query.input, experiment.generation.rag_items)
                retrieved = rag_prompt(task, found, query.input)
            yield query, arm, retrieved


def _majority(items: Sequence[Interaction], task: str) -> str:
    """The most frequent output; among equals, the one seen last."""
    outputs = [item.output for item in items if item.task == task]
    counts = Counter(outputs)
    return max(reversed(outputs), key=counts.__getitem__) if outputs else ""


def _decode(
    worker: Worker, shard: Shard, stack: AdapterStack | None, questions: Sequence[_Question]
) -> list[str]:
    """The text of every question: labels by likelihood where that is configured, everything else by decoding.

    Questions with the very same prompt and adapter are decoded once.
    """
    settings = worker.experiment.generation
    unique = {(question.slot, question.prompt): question for question in questions}
    by_label = [
        key for key, question in unique.items()
        if settings.classify == "likelihood" and get_task(question.query.task).labels
    ]  # fmt: skip
    ranked = set(by_label)
    texts = _generated(worker, shard, stack, {key: value for key, value in unique.items() if key not in ranked})
    texts |= _likeliest(worker, stack, {key: unique[key] for key in by_label})
    return [texts[question.slot, question.prompt] for question in questions]


def _generated(worker: Worker, shard: Shard, stack: AdapterStack | None, asked: dict[Any, _Question]) -> dict[Any, str]:
    settings, tokenizer = worker.experiment.generation, worker.base.tokenizer
    if not asked:
        return {}
    tokens = generate(
        worker.base, stack, [_generation_row(worker, question) for question in asked.values()],
        max_new_tokens=[settings.max_new_tokens or get_task(q.query.task).max_new_tokens for q in asked.values()],
        temperature=settings.temperature,
        seeds=[derive(shard.seed, q.row["device_id"], shard.round, "decode", q.query.query_id) for q in asked.values()],
    )  # fmt: skip
    return {key: decode_answer(tokenizer, ids) for key, ids in zip(asked, tokens, strict=True)}


def _likeliest(worker: Worker, stack: AdapterStack | None, asked: dict[Any, _Question]) -> dict[Any, str]:
    if not asked:
        return {}
    labels = [get_task(question.query.task).labels or () for question in asked.values()]
    ids = [[encode_answer(worker.base.tokenizer, label) for label in names] for names in labels]
    rows = [_generation_row(worker, question) for question in asked.values()]
    scores = label_scores(worker.base, stack, rows, ids)
    return {
        key: names[max(range(len(names)), key=of_label.__getitem__)]
        for key, names, of_label in zip(asked, labels, scores, strict=True)
    }


def _generation_row(worker: Worker, question: _Question) -> GenerationRow:
    return GenerationRow(encode_prompt(worker.base.tokenizer, question.prompt), question.slot)
