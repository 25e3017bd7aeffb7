"""Length: is the sample about as long as what this user writes?"""

from __future__ import annotations

from statistics import median
from typing import Any

from untether.clients.filters.case import Case, Finding, Fixed, text_of
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction, Sample
from untether.sim.population.tasks import get_task


class Length:
    """Words of the sample over the median of the user's own: `low <= ratio <= high`.

    Words are separated by white space. The user's own are the real samples of the task that have the sample's form, or
    all of the task where none has. Where there are none, or their median is no word, there is no ratio, and the sample
    passes. So does an output that is one of the task's closed labels, where the output is read: labels are chosen, not
    written ("style & beauty" is not a rambling "travel").
    """

    embeds = None

    def __init__(self, section: Any) -> None:
        self._reads = section.reads
        self._low, self._high = section.low, section.high

    def examine(self, case: Case) -> Fixed:
        own = {form: self._own(case, form) for form in {sample.form for sample in case.samples}}
        findings = [self._finding(self._words(sample), own[sample.form]) for sample in case.samples]
        if self._reads == "output":
            findings = [
                Finding(finding.score, finding.passed or _is_label(sample))
                for finding, sample in zip(findings, case.samples, strict=True)
            ]
        return Fixed(findings)

    def _words(self, item: Interaction | Sample) -> int:
        return len(text_of(item, self._reads).split())

    def _own(self, case: Case, form: str) -> float:
        alike = [item for item in case.real if item.form == form] or case.real
        return float(median(map(self._words, alike))) if alike else 0.0

    def _finding(self, words: int, own: float) -> Finding:
        if own == 0.0:
            return Finding(None, True)
        ratio = words / own
        return Finding(ratio, self._low <= ratio <= self._high)


def _is_label(sample: Sample) -> bool:
    try:
        labels = get_task(sample.task).labels
    except UserError:  # a task of the caller's own
        return False
    return labels is not None and sample.output.strip() in labels
