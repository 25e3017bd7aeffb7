"""Offline answers: every query of every device, by every arm, in batches on the one resident base model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from untether.clients.device.device import Device
from untether.clients.device.retrieval import Retriever
from untether.clients.device.scoring import answered, prediction_row
from untether.clients.device.worker import Inputs, Worker, rows_of
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.encoding import decode_answer, encode_answer, encode_prompt, is_cut
from untether.clients.engine.generation import GenerationRow, generate, label_scores
from untether.clients.engine.jobs import Example
from untether.clients.stores.adapter_cache import ENGINE
from untether.sim.core.learning import LoraSpec
from untether.sim.core.records import Interaction, Query
from untether.sim.core.seeding import derive
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ARMS, CLOUD, SHARED, Arm, records
from untether.sim.population.order import latest_s
from untether.sim.population.tasks import get_task, rag_prompt
from untether.sim.rounds.messages import Learn

if TYPE_CHECKING:
    from torch import Tensor

Owner = tuple[object, str]
"""Who an adapter belongs to: (device index, arm), or (SHARED, task)."""


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """An adapter, the virtual time from which it answers, and the date of the latest item it may have been trained on.
    """

    spec: LoraSpec
    state: Mapping[str, Tensor]
    version: str
    live_s: float | None = None
    until_s: float | None = None


@dataclass(slots=True)
class Cut:
    """What did not fit into the base model's context, and lost its middle: examples and prompts, by device."""

    examples: Counter[int] = field(default_factory=Counter)
    prompts: Counter[int] = field(default_factory=Counter)

    def learns(self, device: int, examples: Iterable[Example], context: int) -> None:
        """Takes note of a device's examples."""
        self.examples[device] += sum(is_cut(e.prompt_ids, len(e.target_ids) - 1, context) for e in examples)

    def columns(self, devices: Sequence[int]) -> dict[str, list[int]]:
        """Returns the columns of a reply."""
        return {
            "examples_cut": [self.examples[device] for device in devices],
            "prompts_cut": [self.prompts[device] for device in devices],
        }


@dataclass(frozen=True, slots=True)
class _Question:
    row: dict[str, Any]
    device: int
    query: Query
    prompt: str
    adapter: LiveAdapter | None


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    prompt_tokens: int
    new_tokens: int


def answer(
    worker: Worker, order: Learn, devices: Sequence[Device], adapters: Mapping[Owner, Sequence[LiveAdapter]],
    cut: Cut,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers the queries of devices by every arm except `cloud`, and scores the answers.

    Args:
        worker: The worker, with its base model.
        order: The order of the learn pass, which names the round and its schedule.
        devices: The devices to answer for.
        adapters: The adapters by owner, in the order in which they go live. The newest that is live at the time of a
            query answers it; the last one where queries are asked at the round's end; the base model where there is
            none.
        cut: Is told of prompts that do not fit.

    Returns:
        Rows of the table `predictions`.
    """
    timeline, rows, questions = worker.timeline(order.seed, order.measured), [], []
    for device in devices:
        items = device.real_items(worker.experiment, order.round)
        newest_s = {task: _newest_s(items, task) for task in device.user.tasks}
        for number, query, arm, prompt in _asked(worker.experiment, device, order.round, items):
            asked_s = timeline.query_time_s(order.round, device.index, number)
            row = prediction_row(device, query, arm.name, answered_by="base") | {"answered_time_s": asked_s}
            rows.append(row)
            if arm.answers == "majority":
                row |= {"answered_by": arm.answers, "data_until_s": newest_s[query.task]}
                answered(row, _majority(items, query.task))
                continue
            if arm.retrieves:
                row["data_until_s"] = newest_s[query.task]
            adapter = _live(worker.experiment, adapters.get(_owner(device, query, arm), ()), asked_s)
            if adapter is not None:
                row["answered_by"] = arm.answers
                row |= {"adapter_version": adapter.version, "adapter_time_s": adapter.live_s}
                row.setdefault("data_until_s", adapter.until_s)
            questions.append(_Question(row, device.index, query, prompt, adapter))
    for question, found in zip(questions, _decode(worker, order, questions, cut), strict=True):
        answered(question.row, found.text)
        question.row["answered_time_s"] += timeline.answer_s(
            question.device, question.row["arm"], found.prompt_tokens, found.new_tokens
        )
    return rows


def questions_due(experiment: Experiment, order: Learn, devices: Sequence[Device]) -> int:
    """Returns how many answers the base model is to write for these devices."""
    arms = [arm for arm in records(experiment.arms) if arm.answers not in ("cloud", "majority")]
    return sum(
        arm.answers_kind(get_task(query.task).kind)
        for device in devices for query in device.queries(order.round) for arm in arms
    )  # fmt: skip


def cloud_answers(
    worker: Worker, order: Learn, devices: Sequence[Device], inputs: Inputs
) -> list[dict[str, Any]]:
    """Returns prediction rows of the `cloud` arm, from the answers of the fetch pass.

    The outcome is `no_answer` where the cloud sent none, or where the answer never reached its device. The time of an
    answer is that of the request's event.
    """
    lost = {row.request for row in order.lost}  # of these very devices
    found = rows_of(inputs.answers)
    received = {(row["device_id"], row["query_id"]): row for row in found if row["request_id"] not in lost}
    rows = []
    for device in devices:
        items = device.real_items(worker.experiment, order.round)
        for query in device.queries(order.round):
            found = received.get((device.device_id, query.query_id), {"outcome": "no_answer", "text": ""})
            row = prediction_row(device, query, CLOUD, answered_by=ARMS[CLOUD].answers)
            row["data_until_s"] = _newest_s(items, query.task)
            rows.append(answered(row, found["text"], found["outcome"]))
    return rows


def _newest_s(items: Sequence[Interaction], task: str) -> float | None:
    """The date of the latest item of a task; None where there is none."""
    return latest_s(item for item in items if item.task == task)


def _live(experiment: Experiment, adapters: Sequence[LiveAdapter], time_s: float) -> LiveAdapter | None:
    if experiment.hardware.queries == "day":
        adapters = [adapter for adapter in adapters if adapter.live_s is None or adapter.live_s <= time_s]
    return adapters[-1] if adapters else None


def _owner(device: Device, query: Query, arm: Arm) -> Owner:
    return (SHARED, query.task) if arm.answers == "shared" else (device.index, arm.adapter)


def _asked(
    experiment: Experiment, device: Device, round: int, items: Sequence[Interaction]
) -> Iterable[tuple[int, Query, Arm, str]]:
    """(number, query, arm, prompt) for every query of a device's round and every arm that the device answers."""
    retrievers = {task: Retriever([item for item in items if item.task == task]) for task in device.user.tasks}
    for number, query in enumerate(device.queries(round)):
        task, retrieved = get_task(query.task), None
        plain = task.prompt(query.input)
        for arm in records(experiment.arms):
            if arm.answers == "cloud" or not arm.answers_kind(task.kind):
                continue
            if not arm.retrieves:
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


def _decode(worker: Worker, order: Learn, questions: Sequence[_Question], cut: Cut) -> list[_Answer]:
    """The answer to every question: labels by likelihood where that is configured, everything else by decoding.

    Questions with the very same prompt and equal adapters are decoded once, and not at all where `engine.cache` has it.
    """
    names = [(id(question.adapter), question.prompt) for question in questions]
    unique = dict(zip(names, questions, strict=True))
    encoded = {prompt: encode_prompt(worker.base.tokenizer, prompt) for _, prompt in unique}  # one for several arms
    prepared = {name: _prepared(worker, order, question, encoded[name[1]]) for name, question in unique.items()}
    asked = {one.content: one for one in prepared.values()}
    longest = functools.cache(lambda labels: max(len(encode_answer(worker.base.tokenizer, name)) for name in labels))
    for question, name in zip(questions, names, strict=True):
        one = prepared[name]
        more = longest(one.labels) if one.labels else one.limit
        cut.prompts[question.device] += is_cut(one.prompt_ids, more, worker.base.context_length)
    store = worker.answers
    kept = store.get(list(asked)) if store else {}
    answers = {content: _Answer(*json.loads(value)) for content, value in kept.items()}
    missing = [one for content, one in asked.items() if content not in answers]
    if missing:
        told, share = worker.work.get("devices", 0.0), len(order.devices) / len(questions)

        def progress(done: int) -> None:
            answers = len(questions) - len(missing) + done
            worker.progress(max(told, answers * share), answers=answers, answers_due=len(questions))

        new = {one.content: found for one, found in zip(missing, _decoded(worker, missing, progress), strict=True)}
        if store:
            store.put({content: json.dumps(astuple(found)).encode() for content, found in new.items()})
        answers |= new
    return [answers[prepared[name].content] for name in names]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What an answer is made of. `labels`: to choose from by likelihood; none: decode up to `limit` tokens."""

    adapter: LiveAdapter | None
    prompt_ids: list[int]
    labels: tuple[str, ...]
    limit: int
    seed: int
    content: bytes
    """A digest of all that, the base model and the way of drawing: equal contents, equal answers."""


def _prepared(worker: Worker, order: Learn, question: _Question, prompt_ids: list[int]) -> _Prepared:
    settings, task, adapter = worker.experiment.generation, get_task(question.query.task), question.adapter
    labels = tuple(task.labels or ()) if worker.experiment.by_likelihood else ()
    limit = 0 if labels else settings.max_new_tokens or task.max_new_tokens
    seed = derive(order.seed, question.row["device_id"], order.round, "decode", question.query.query_id)
    drawn = (settings.temperature, seed) if settings.temperature > 0 and not labels else ()
    worn = (adapter.version, astuple(adapter.spec)) if adapter else ()
    words = f"{ENGINE} {worker.base.fingerprint} {worker.base.arithmetic} {worn!r} {labels!r} {limit} {drawn!r}"
    digest = hashlib.blake2b(words.encode(), digest_size=20)
    digest.update(np.asarray(prompt_ids, dtype="<i4").tobytes())
    return _Prepared(adapter, prompt_ids, labels, limit, seed, digest.digest())


def _decoded(worker: Worker, asked: Sequence[_Prepared], progress: Callable[[int], None]) -> list[_Answer]:
    worn = list({id(one.adapter): one.adapter for one in asked if one.adapter is not None}.values())
    stack = AdapterStack.of_states(
        worker.base, [adapter.spec for adapter in worn], [dict(adapter.state) for adapter in worn]
    ) if worn else None  # fmt: skip
    slots = {id(adapter): number for number, adapter in enumerate(worn)}
    rows = [GenerationRow(one.prompt_ids, slots.get(id(one.adapter))) for one in asked]
    generated = [number for number, one in enumerate(asked) if not one.labels]
    ranked = [number for number, one in enumerate(asked) if one.labels]
    answers: dict[int, _Answer] = {}
    if generated:
        tokens = generate(
            worker.base, stack, [rows[number] for number in generated],
            max_new_tokens=[asked[number].limit for number in generated],
            temperature=worker.experiment.generation.temperature,
            seeds=[asked[number].seed for number in generated],
            progress=lambda done, total: progress(done),
        )  # fmt: skip
        for number, ids in zip(generated, tokens, strict=True):
            text = decode_answer(worker.base.tokenizer, ids)
            answers[number] = _Answer(text, len(rows[number].prompt_ids), len(ids))
    if ranked:
        ids_of = [[encode_answer(worker.base.tokenizer, name) for name in asked[number].labels] for number in ranked]
        scores = label_scores(worker.base, stack, [rows[number] for number in ranked], ids_of)
        for number, ids, of_label in zip(ranked, ids_of, scores, strict=True):
            best = max(range(len(of_label)), key=of_label.__getitem__)
            answers[number] = _Answer(asked[number].labels[best], len(rows[number].prompt_ids), len(ids[best]))
    return [answers[number] for number in range(len(asked))]
