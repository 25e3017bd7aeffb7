"""Augmentation on the device: requests for synthetic samples, and the samples that the replies hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from untether.clients.cloud.privacy import masking, shown_items
from untether.clients.cloud.records import CloudReply, CloudRequest
from untether.clients.device.device import Device
from untether.sim.core.records import Interaction, Query, Sample
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import CLOUD, records
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import Mask, TaskLike, build_answer_request, build_samples_request
from untether.sim.rounds.messages import Order


def samples_requests(
    task: TaskLike,
    items: Sequence[Interaction],
    count: int,
    *,
    request_id: str,
    device_id: str,
    seed: int,
    round: int,
    purpose: str = "augment",
    samples_per_request: int = 8,
    show_items: int = 16,
    show_chars: int = 12_000,
    mask: Mask | None = None,
) -> list[CloudRequest]:
    """Splits an order for synthetic samples of one task into requests, named `request_id`, `request_id+1`, ...

    Every request has its own random draws and uploads the items that it shows: the privacy ledger counts all of them.

    Args:
        task: The task.
        items: The task's items in history order; the newest are shown.
        count: How many samples to ask for in all.
        request_id: Name of the first request.
        device_id: The device that asks.
        seed, round, purpose: What the requests' seeds follow from.
        samples_per_request: Most samples of one request.
        show_items: Most items that a request shows.
        show_chars: Most characters of items that a request shows.
    """
    requests = []
    for part, wanted in enumerate(_split(count, samples_per_request)):
        prompt = build_samples_request(
            task, items, wanted, max_items=show_items, max_chars=show_chars, mask=mask
        )  # fmt: skip
        requests.append(
            CloudRequest(
                request_id=request_id if part == 0 else f"{request_id}+{part}",
                device_id=device_id,
                task=task.name,
                messages=prompt.messages,
                purpose=f"{purpose}/{task.name}/{part}",
                count=wanted,
                seed=seed,
                round=round,
                labels=prompt.labels,
                uploaded=prompt.uploaded,
            )
        )
    return requests


def answer_request(
    task: TaskLike,
    items: Sequence[Interaction],
    query: str,
    query_id: str,
    *,
    request_id: str,
    device_id: str,
    seed: int,
    round: int,
    show_items: int = 16,
    show_chars: int = 12_000,
    temperature: float = 0.0,
    mask: Mask | None = None,
) -> CloudRequest:
    """Returns a request for the cloud model's answer to a query, with the history in its prompt (the `cloud` arm).

    Args:
        task: The task.
        items: The task's items in history order; the newest are shown.
        query: The query's content.
        query_id: Its name in the privacy ledger.
        request_id: Name of the request.
        device_id: The device that asks.
        seed, round: What the request's seed follows from.
        show_items: Most items that the request shows.
        show_chars: Most characters of items that the request shows.
        temperature: 0 is greedy.
    """
    prompt = build_answer_request(
        task, items, query, query_id=query_id, max_items=show_items, max_chars=show_chars, mask=mask
    )  # fmt: skip
    return CloudRequest(
        request_id=request_id,
        device_id=device_id,
        task=task.name,
        messages=prompt.messages,
        purpose=f"answer/{task.name}/{query_id}",
        seed=seed,
        round=round,
        kind="answer",
        labels=prompt.labels,
        uploaded=prompt.uploaded,
        temperature=temperature,
    )


def sample_orders(experiment: Experiment, order: Order, device: Device) -> list[CloudRequest]:
    """Returns all requests for synthetic samples that a device may make in a round, from the items that it has by then.
    """
    cloud = experiment.cloud
    if not cloud.samples or not any(arm.needs_samples for arm in records(experiment.arms)):
        return []
    items, mask = device.real_items(experiment, order.round), masking(experiment.privacy)
    return [
        request
        for task in device.user.tasks
        for request in samples_requests(
            get_task(task), _shown(experiment, order, device, items, task), cloud.samples, mask=mask,
            request_id=f"s{order.seed}-r{order.round}-{device.device_id}-{task}", device_id=device.device_id,
            seed=order.seed, round=order.round, samples_per_request=cloud.samples_per_request,
            show_items=cloud.show_items, show_chars=cloud.show_chars,
        )
    ]  # fmt: skip


def questions(experiment: Experiment, order: Order, device: Device) -> list[tuple[CloudRequest, Query]]:
    """Returns the requests of a device's cloud arm: every query of the round with the history in its prompt."""
    cloud = experiment.cloud
    if CLOUD not in experiment.arms:
        return []
    items, mask = device.real_items(experiment, order.round), masking(experiment.privacy)
    return [
        (
            answer_request(
                get_task(query.task), _shown(experiment, order, device, items, query.task), query.input, query.query_id,
                request_id=f"s{order.seed}-r{order.round}-{device.device_id}-{query.task}-q{number}",
                device_id=device.device_id, seed=order.seed, round=order.round, show_items=cloud.show_items,
                show_chars=cloud.show_chars, mask=mask,
            ),
            query,
        )
        for number, query in enumerate(device.queries(order.round))
    ]


def _shown(
    experiment: Experiment, order: Order, device: Device, items: Sequence[Interaction], task: str
) -> list[Interaction]:
    own = [item for item in items if item.task == task]
    return shown_items(own, experiment.privacy, order.seed, device.device_id)


def asking_again(
    experiment: Experiment, order: Order, device: Device, samples: Sequence[Sample]
) -> list[tuple[CloudRequest, Sample]]:
    """Returns the requests of the filter `self_consistency`: each sample's input as a query, with the history in the
    prompt.

    They show what the sample's own request has shown, to the same cloud.
    """
    cloud = experiment.cloud
    items, mask = device.real_items(experiment, order.round), masking(experiment.privacy)
    return [
        (
            answer_request(
                get_task(sample.task), _shown(experiment, order, device, items, sample.task), sample.input,
                sample.sample_id, request_id=f"{sample.sample_id}~", device_id=device.device_id, seed=order.seed,
                round=order.round, show_items=cloud.show_items, show_chars=cloud.show_chars, mask=mask,
            ),
            sample,
        )
        for sample in samples
    ]


def with_checks(reply: CloudReply, checks: Sequence[CloudReply]) -> CloudReply:
    """Returns a reply whose last attempt bears what asking again about its samples took, too: bytes, tokens, time."""
    if not checks or not reply.attempts:
        return reply
    *before, last = reply.attempts
    costs = {
        name: (getattr(last, name) or 0) + sum(check.total(name) for check in checks)
        for name in ("bytes_up", "bytes_down", "tokens_in", "tokens_out", "duration_s")
    }
    return replace(reply, attempts=(*before, replace(last, **costs)))


def samples_from(requests: Sequence[CloudRequest], replies: Sequence[CloudReply]) -> list[Sample]:
    """Returns the samples in the replies, in the order of the requests, with ids `request_id/number`.

    Labels that differ from the task's in case or outer spaces only are written as the task writes them.
    """
    by_id: Mapping[str, CloudReply] = {reply.request_id: reply for reply in replies}
    samples = []
    for request in requests:
        reply = by_id.get(request.request_id)
        spelling = {label.strip().lower(): label for label in request.labels}
        for number, pair in enumerate(reply.pairs if reply is not None else ()):
            output = spelling.get(pair.output.lower(), pair.output)
            sample_id = f"{request.request_id}/{number}"
            samples.append(Sample(sample_id, request.request_id, request.task, pair.input, output))
    return samples


def merge_outcomes(replies: Sequence[CloudReply]) -> str:
    """Returns the outcome of an order that was split: `ok` if any part returned samples, else that of its first part.
    """
    if any(reply.ok for reply in replies):
        return "ok"
    return replies[0].outcome if replies else "no_samples"


def _split(count: int, size: int) -> list[int]:
    full, rest = divmod(count, size)
    return [size] * full + ([rest] if rest else [])
