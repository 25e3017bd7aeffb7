"""What hosts reply to an order: counts by device, and where the tables are that they wrote. No text of a user is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from untether.sim.core.errors import Failure
from untether.sim.rounds.material import Material

_COUNTS = [field.name for field in fields(Material)]
_NOT_COUNTED = ("device", "outcome", "errors")


@dataclass(frozen=True, slots=True)
class Reply:
    """What one host says of a pass.

    `columns`: a value a device, `device` (its number) and `outcome` among them. `parts`: the tables' parts that it
    wrote. `models`: what it used, by name, with the fingerprint. `failures`: the workers that died under it.
    """

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    failures: Sequence[Mapping[str, Any]] = ()

    def counts(self) -> dict[str, float]:
        """The sum of every counted column, and the number of devices by outcome."""
        found = {name: sum(values) for name, values in self.columns.items() if not name.startswith(_NOT_COUNTED)}
        outcomes = list(self.columns.get("outcome", ()))
        return found | {f"outcome.{name}": outcomes.count(name) for name in sorted(set(outcomes))}


def totals(replies: Iterable[Reply]) -> dict[str, float]:
    """The hosts' counts, added up."""
    found: dict[str, float] = {}
    for reply in replies:
        for name, value in reply.counts().items():
            found[name] = found.get(name, 0) + value
    return found


def gather(replies: Iterable[Reply]) -> dict[str, list[str]]:
    """The parts that were written, by table."""
    parts: dict[str, list[str]] = {}
    for reply in replies:
        for table, paths in reply.parts.items():
            parts.setdefault(table, []).extend(paths)
    return parts


def complete(devices: Iterable[int], replies: Iterable[Reply]) -> None:
    """Raises Failure if a device of the plan is in no reply: a round is committed whole."""
    wanted = set(devices)
    if missing := wanted.difference(*(reply.columns.get("device", ()) for reply in replies)):
        raise Failure(f"{len(missing)} of {len(wanted)} devices are in no host's reply, such as {min(missing)}")


def materials(replies: Iterable[Reply]) -> dict[int, Material]:
    """What each device could train on; a device that was lost in the pass has none."""
    return {device: Material(*counts) for device, *counts in _rows(replies, *_COUNTS)}


def errors(replies: Sequence[Reply]) -> dict[str, dict[int, list[float]]]:
    """How wrong each device's answers were, where the policy wants to know: by what the watched arm learns from."""
    names = {name for reply in replies for name in reply.columns if name.startswith("errors.")}
    return {
        name.removeprefix("errors."): {device: json.loads(found) for device, found in _rows(replies, name)}
        for name in sorted(names)
    }


def _rows(replies: Iterable[Reply], *names: str) -> Iterator[tuple[Any, ...]]:
    for reply in replies:
        yield from zip(*(reply.columns.get(name, ()) for name in ("device", *names)), strict=False)
