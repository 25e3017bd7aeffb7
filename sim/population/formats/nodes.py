"""The users of a deployment, as far as its server may know them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from untether.sim.core.errors import UserError
from untether.sim.core.records import User
from untether.sim.experiment import Experiment
from untether.sim.population.source import Population


class FromNodes(Population):
    """The users of a deployment's nodes, of whom the server knows how many questions of which task each will ask.

    `population.path` is the file that the run keeps of it: for each device what `told` returned there.
    """

    def __init__(self, experiment: Experiment, seed: int):
        self.experiment = experiment

    @cached_property
    def _told(self) -> list[Mapping[str, Any]]:
        path = self.experiment.population.path
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f'population.source = "nodes": what nodes told of their users is not in `{path}` ({error}). Start a '
                "deployment with `untether deploy`, or with `flwr run` and the run config `nodes`; see docs/deploy.md"
            ) from None

    def __len__(self) -> int:
        return len(self._told)

    @property
    def order(self) -> str:
        return "time" if all(one["order"] == "time" for one in self._told) else "unknown"

    def user(self, index: int) -> User:
        raise UserError(f"device {index}: its user is on its node, and nowhere else")

    def asked(self, index: int) -> list[tuple[str, int | None]]:
        return [(task, round) for task, round in self._told[index]["asked"]]

    def exclusions(self) -> Counter[str]:
        return sum((Counter(one["exclusions"]) for one in self._told), Counter())


def told(population: Population, device: int) -> dict[str, Any]:
    """Returns what a node tells of its user before a run: counts by task, no text."""
    asked: Sequence[Any] = [list(each) for each in population.asked(device)]
    return {"asked": asked, "order": population.order, "exclusions": dict(population.exclusions())}
