"""The interface of a filter: its input (a case: one device's candidates for one task) and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from untether.clients.filters.beside import Beside
from untether.sim.core.records import Interaction, Reads, Sample


def text_of(item: Interaction | Sample, reads: Reads) -> str:
    """Returns the text that a filter reads: the input, the output, or the pair.

    The pair puts the output first: an encoder cuts long texts at the end, and should not cut the short, personal
    output.
    """
    if reads == "input":
        return item.input
    if reads == "output":
        return item.output
    return f"{item.output}\n{item.input}"


class Finding(NamedTuple):
    """One filter's answer on one sample. `score` is None where there was nothing to compare with; that passes."""

    score: float | None
    passed: bool


@dataclass(frozen=True)
class Case:
    """One device's candidate samples for one task, beside its real samples of that task.

    `sample_vectors` and `real_vectors` hold unit vectors by the text that was read: float32 `[samples, dim]` and
    `[real, dim]`.
    `beside` is what a filter may be told beyond the texts; `other_vectors` are those of its other users' samples, for
    filters that say `reads_others`.
    """

    samples: Sequence[Sample]
    real: Sequence[Interaction]
    sample_vectors: Mapping[str, np.ndarray]
    real_vectors: Mapping[str, np.ndarray]
    beside: Beside = Beside()
    other_vectors: Mapping[str, np.ndarray] = field(default_factory=dict)


class Examination(Protocol):
    """A filter's work on one case. Each sample is asked about once, in order."""

    def finding(self, index: int) -> Finding:
        """Returns the filter's answer on sample `index`, given the samples accepted so far."""

    def accept(self, index: int) -> None:
        """Records that every filter accepted sample `index`."""


class Filter(Protocol):
    """A filter. `embeds` says which text's vectors the case must hold for it; None: it needs none.

    One that has a true attribute `reads_others`, `asks_again` or `reviewed` is told that part of `case.beside`,
    which costs something: embeddings of other users' samples, requests to the cloud, a person's time.
    """

    embeds: Reads | None

    def examine(self, case: Case) -> Examination:
        """Starts the examination of a case."""


class Fixed:
    """The examination of a filter whose answer does not depend on what was accepted before."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self._findings = findings

    def finding(self, index: int) -> Finding:
        return self._findings[index]

    def accept(self, index: int) -> None:
        pass
