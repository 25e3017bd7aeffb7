"""How far a pass is: plain counts by name, which a worker says while it works, hosts add up and a display reads.

`devices`: how many are done, about. The work itself is counted: of `tokens`, say, `tokens_due` are to be done by
`tokens_of` devices, those that have begun. `cloud.ok`, `cloud.timeout`, ...: replies by outcome; `cloud_s`: the seconds
they took together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

Work = Mapping[str, float]

UNITS = ("requests", "samples", "tokens", "answers")
"""What is counted: requests to the cloud, samples that filters judge, tokens trained on, answers written."""


def added(works: Iterable[Work]) -> dict[str, float]:
    """Returns their sums by name."""
    found: dict[str, float] = {}
    for work in works:
        for name, count in work.items():
            found[name] = found.get(name, 0.0) + count
    return found


def finished(work: Work, devices: int) -> dict[str, float]:
    """Returns the counts of a shard of so many devices that is done, whatever it said last."""
    counted = [unit for unit in UNITS if f"{unit}_due" in work]
    due = {f"{unit}_due": work.get(unit, 0.0) for unit in counted}
    return {**work, **due, **{f"{unit}_of": float(devices) for unit in counted}, "devices": float(devices)}


def written(work: Work) -> str:
    """Returns it as one line."""
    return json.dumps({name: round(count, 3) for name, count in work.items()})


def read(text: str) -> dict[str, float]:
    """Returns what `written` wrote; empty for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return {str(name): float(count) for name, count in found.items()} if isinstance(found, dict) else {}
