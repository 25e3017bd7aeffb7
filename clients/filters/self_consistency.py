"""Self-consistency: a pair whose answer the cloud would not give again was a slip."""

from __future__ import annotations

from typing import Any

from untether.clients.filters.case import Case, Finding, Fixed
from untether.sim.core.kinds import METRICS
from untether.sim.population.tasks import get_task, higher_is_better

STARS = 4.0
"""Furthest that two ratings can be apart."""


class SelfConsistency:
    """Agreement, `low` at least, of a sample's output with what the cloud answers when it is asked the input again.

    Who fetches asks (`case.beside.agreement`, by sample id). A sample that was not asked again has no score and passes.
    """

    embeds = None
    asks_again = True

    def __init__(self, section: Any) -> None:
        self._low = section.low

    def examine(self, case: Case) -> Fixed:
        known = case.beside.agreement
        scores = [known.get(sample.sample_id) for sample in case.samples]
        return Fixed([Finding(score, score is None or score >= self._low) for score in scores])


def agreement(task: str, output: str, again: str) -> float:
    """Returns how far two outputs agree, 0 to 1, by the task's primary metric; what is no answer, a rating that is no
    number, agrees with none.
    """
    metric = get_task(task).primary
    try:
        score = float(METRICS.get(metric)(again, output))
    except ValueError:
        return 0.0
    return score if higher_is_better(metric) else max(0.0, 1.0 - score / STARS)
