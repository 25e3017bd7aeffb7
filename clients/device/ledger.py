"""The privacy ledger: which items of a user's history each attempt to reach the cloud uploaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from untether.clients.device.augmentation import questions, sample_orders
from untether.clients.device.device import Device
from untether.sim.experiment import Experiment
from untether.sim.prompts.protocol import CHARS_PER_TOKEN
from untether.sim.rounds.messages import Learn


def ledger_rows(
    experiment: Experiment, devices: Sequence[Device], order: Learn
) -> list[dict[str, Any]]:
    """Returns a row for every item that an attempt among the order's `uploads` carried.

    An item counts whole or, where the link broke during the transfer, in part, at the attempt's own time. The bytes of
    a message are assumed to be spread evenly over its characters.
    """
    attempts: dict[int, list[tuple[str, int, float, float]]] = defaultdict(list)
    for device, *attempt in order.uploads:
        attempts[device].append(tuple(attempt))
    rows = []
    for device in devices:
        if not attempts[device.index]:
            continue
        requests = [*sample_orders(experiment, order, device)]
        requests += [request for request, _ in questions(experiment, order, device)]
        uploaded = {request.request_id: request.uploaded for request in requests}
        for request_id, number, time_s, copies in attempts[device.index]:
            for item in uploaded[request_id]:
                if chars := item.sent(copies):
                    rows.append({
                        "time_s": time_s, "device_id": device.device_id, "request_id": request_id, "attempt": number,
                        "kind": item.kind, "item_id": item.item_id, "chars": chars,
                        "tokens": -(-chars // CHARS_PER_TOKEN), "masked": item.masked,
                    })  # fmt: skip
    return rows
