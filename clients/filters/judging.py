"""Applies the filters to the samples of many devices: one pass through the encoder, then each device by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from untether.clients.filters.beside import Beside
from untether.clients.filters.case import Case, Filter, text_of
from untether.sim.core.errors import UserError
from untether.sim.core.kinds import FILTERS
from untether.sim.core.records import Interaction, JudgedSample, Reads, Sample

Key = TypeVar("Key", bound=Hashable)
LeakCheck = Callable[[Sample], bool]
COLUMNS = {"semantic": "semantic", "diversity": "diversity", "length": "length_ratio"}


class TextEncoder(Protocol):
    """What `judge` needs of an encoder: see `clients.filters.embedding.Encoder`."""

    def encode(self, texts: Sequence[str], *, remember: Any = None) -> np.ndarray:
        """Returns unit vectors, float32 `[texts, dim]`."""


def create_filters(filters: Any, settings: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Filter]:
    """Returns the enabled filters of a `filters` section by name, in its order.

    Args:
        filters: The experiment's section.
        settings: The experiment's tables for plug-ins, by name.

    Raises:
        UserError: A name is unknown or repeated.
    """
    made: dict[str, Filter] = {}
    for position, name in enumerate(filters.order):
        FILTERS.check(name)
        if name in filters.order[:position]:
            raise UserError(f'filters.order lists "{name}" twice. A filter is applied once: name each one time.')
        section = getattr(filters, name, None)
        if section is None:
            made[name] = FILTERS.bind(name, settings or {})()
        elif section.enabled:
            made[name] = FILTERS.get(name)(section)
    return made


def judge(
    candidates: Mapping[Key, Sequence[Sample]],
    real: Mapping[Key, Sequence[Interaction]],
    filters: Any,
    encoder: TextEncoder | None,
    leaks: LeakCheck | Mapping[Key, LeakCheck] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    beside: Mapping[Key, Beside] | None = None,
) -> dict[Key, list[JudgedSample]]:
    """Returns a verdict for every sample of every device, in the samples' order.

    A sample is compared with its own device's real samples of its own task only, so a device's verdicts do not depend
    on other devices. The verdict names the first filter in `filters.order` that rejects the sample; the score of every
    enabled filter is kept all the same (other than the three official ones: in `extra`).

    Args:
        candidates: Synthetic samples by device.
        real: Real samples by device.
        filters: The experiment's section.
        encoder: May be None where no enabled filter embeds.
        leaks: The evaluator's check, one for all or one a device. It comes last and changes no filter's decision:
            `extra["leak"]` is 1 for every sample that leaks, and one that all filters accepted becomes
            `rejected_by:leak`.
        settings: The experiment's tables for plug-ins, by name.
        beside: Tells some filters more of a device (`clients.filters.beside`).

    Raises:
        UserError: A filter is unknown.
    """
    rules = create_filters(filters, settings)
    vectors = _Vectors(candidates, real, list(rules.values()), encoder, beside or {})
    checks = leaks if isinstance(leaks, Mapping) else dict.fromkeys(candidates, leaks)
    told = beside or {}
    return {
        key: _judge_device(samples, real.get(key, ()), rules, vectors, checks.get(key), told.get(key, Beside()))
        for key, samples in candidates.items()
    }


def _judge_device(
    samples: Sequence[Sample],
    real: Sequence[Interaction],
    rules: Mapping[str, Filter],
    vectors: _Vectors,
    leaks: LeakCheck | None,
    beside: Beside,
) -> list[JudgedSample]:
    judged: list[JudgedSample | None] = [None] * len(samples)
    for task in dict.fromkeys(sample.task for sample in samples):
        rows = [row for row, sample in enumerate(samples) if sample.task == task]
        case = vectors.case([samples[row] for row in rows], [item for item in real if item.task == task], beside, task)
        for row, verdict in zip(rows, _judge_case(case, rules, leaks), strict=True):
            judged[row] = verdict
    return judged


def _judge_case(case: Case, rules: Mapping[str, Filter], leaks: LeakCheck | None) -> list[JudgedSample]:
    examinations = [(name, rule.examine(case)) for name, rule in rules.items()]
    judged = []
    for index, sample in enumerate(case.samples):
        findings = {name: examination.finding(index) for name, examination in examinations}
        rejecting = next((name for name, finding in findings.items() if not finding.passed), None)
        if rejecting is None:
            for _, examination in examinations:
                examination.accept(index)
        scores = {name: finding.score for name, finding in findings.items() if finding.score is not None}
        extra = {name: score for name, score in scores.items() if name not in COLUMNS}
        if leaks is not None and leaks(sample):
            extra["leak"] = 1.0
            rejecting = rejecting or "leak"
        verdict = f"rejected_by:{rejecting}" if rejecting else "accepted"
        columns = {column: scores.get(name) for name, column in COLUMNS.items()}
        judged.append(JudgedSample(sample, **columns, verdict=verdict, extra=extra))
    return judged


class _Vectors:
    """The vectors of all texts that any filter reads, embedded in one call: distinct texts once."""

    def __init__(
        self,
        candidates: Mapping[Key, Sequence[Sample]],
        real: Mapping[Key, Sequence[Interaction]],
        rules: Sequence[Filter],
        encoder: TextEncoder | None,
        beside: Mapping[Any, Beside],
    ) -> None:
        self._reads = tuple(dict.fromkeys(rule.embeds for rule in rules if rule.embeds is not None))
        items = [item for key in candidates for item in real.get(key, ())] if self._reads else []
        real_texts = {text_of(item, reads) for reads in self._reads for item in items}
        wide = {rule.embeds for rule in rules if rule.embeds is not None and getattr(rule, "reads_others", False)}
        self._wide = tuple(reads for reads in self._reads if reads in wide)
        others = {id(item): item for each in beside.values() for item in each.others}.values()
        real_texts |= {text_of(item, reads) for reads in self._wide for item in others}
        sample_texts = {text_of(s, reads) for reads in self._reads for samples in candidates.values() for s in samples}
        texts = sorted(real_texts | sample_texts)
        self._row = {text: row for row, text in enumerate(texts)}
        self._matrix = encoder.encode(texts, remember=real_texts) if texts else np.zeros((0, 1), dtype=np.float32)

    def case(
        self, samples: Sequence[Sample], real: Sequence[Interaction], beside: Beside, task: str
    ) -> Case:
        others = [item for item in beside.others if item.task == task] if self._wide else []
        vectors = self._take(samples, self._reads), self._take(real, self._reads)
        return Case(samples, real, *vectors, beside, self._take(others, self._wide))

    def _take(self, items: Sequence[Sample | Interaction], kinds: Sequence[Reads]) -> dict[str, np.ndarray]:
        return {
            reads: self._matrix[np.array([self._row[text_of(item, reads)] for item in items], dtype=int)]
            for reads in kinds
        }
