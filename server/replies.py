"""What hosts reply: counts by device, and where the tables are that they wrote. No text of a user is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from flwr.app import Message

from sim.errors import Failure
from sim.rounds import Material

_COUNTS = [field.name for field in fields(Material)]


def result(reply: Message, name: str) -> Any:
    """A part of what a pass came to, such as `models` or `failures`."""
    return json.loads(str(reply.content["result"][name]))


def gather(replies: Sequence[Message]) -> dict[str, list[str]]:
    """The parts that were written, by table."""
    parts: dict[str, list[str]] = {}
    for reply in replies:
        for table, paths in result(reply, "parts").items():
            parts.setdefault(table, []).extend(paths)
    return parts


def complete(devices: Sequence[int], replies: Sequence[Message]) -> None:
    """Raises Failure if a device of the plan is in no reply: a round is committed whole."""
    missing = set(devices).difference(*(reply.content["devices"].get("device", []) for reply in replies))
    if missing:
        raise Failure(f"{len(missing)} of {len(devices)} devices are in no host's reply, such as {min(missing)}")


def materials(replies: Sequence[Message]) -> dict[int, Material]:
    """What each device of the fetch pass could train on; a device that was lost there has none."""
    return {device: Material(*counts) for device, *counts in _rows(replies, *_COUNTS)}


def errors(replies: Sequence[Message]) -> dict[int, list[float]]:
    """How wrong each device's answers were, where the policy wants to know."""
    return {device: json.loads(found) for device, found in _rows(replies, "errors")}


def _rows(replies: Sequence[Message], *names: str) -> Iterator[tuple[Any, ...]]:
    for reply in replies:
        columns = reply.content["devices"]
        yield from zip(*(columns.get(name, ()) for name in ("device", *names)), strict=False)
