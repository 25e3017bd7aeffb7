"""The record types that all packages use. They import nothing of the project.

An *interaction* is one thing a user did (input, output, date). A *query* is a held-out interaction that a device must
answer offline. A *user* is a history of interactions and the queries asked of it. A *sample* is one synthetic
input-output pair that a cloud wrote for a user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Reads = Literal["input", "output", "pair"]
"""What of an interaction or sample a filter reads."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One item of a user's history.

    `input` and `output` are the content alone (the article, its headline); the instruction around them belongs to the
    task (`sim.population.tasks`). `form` says how the pair is shaped: `"query"` like the task's own queries, or the
    name of the auxiliary shape the task trains on where profiles are not shaped like queries (LaMP-1: `"title"`,
    abstract -> title; LaMP-7: `"complete"`, first words -> rest). `time_s` is seconds since 1970
    (UTC), None if undated. A date that is a month or a year alone stands for all its days: `time_s` is their begin and
    `until_s` their end (the next midnight); None where the day is known. `round` is the round at whose start the device
    has it, where histories are replayed.
    """

    item_id: str
    task: str
    input: str
    output: str
    time_s: float | None = None
    form: str = "query"
    round: int = 0
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """A held-out question. `input` is the content without the instruction, `gold` the expected answer. Of
    a date that is a month or a year alone, `time_s` is the begin.

    `visible` is how many of the user's interactions of this task, in history order, precede this query. `round` is the
    round in which it is asked (None: in every one).
    """

    query_id: str
    task: str
    input: str
    gold: str
    time_s: float | None = None
    visible: int | None = None
    round: int | None = None


@dataclass(frozen=True, slots=True)
class User:
    """A user: history in time order (all tasks together) and queries. `of_task` gives the history of one task.

    `cluster` names what makes some users alike, such as the archetype that they share: the statistics do not treat them
    as independent, in whatever seed they are. Empty: the user is a cluster alone.
    """

    user_id: str
    history: tuple[Interaction, ...]
    queries: tuple[Query, ...]
    cluster: str = ""

    def of_task(self, task: str) -> tuple[Interaction, ...]:
        """Returns the history's items of one task, in history order."""
        return tuple(item for item in self.history if item.task == task)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks this user has queries for, in order of first appearance."""
        return tuple(dict.fromkeys(query.task for query in self.queries))


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Why a user, an item or a question of the source was left out; exclusions are counted and reported."""

    reason: str
    what: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A synthetic pair as the cloud wrote it, before any filter. `form` as in Interaction."""

    sample_id: str
    request_id: str
    task: str
    input: str
    output: str
    form: str = "query"


@dataclass(frozen=True, slots=True)
class JudgedSample:
    """A sample with the score of every filter that read it and the verdict.

    `verdict` is `accepted` or `rejected_by:<filter>`. A score is None where an earlier, cheaper check decided first
    and the filter could not be computed.
    """

    sample: Sample
    semantic: float | None
    diversity: float | None
    length_ratio: float | None
    verdict: str
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether every filter accepted it."""
        return self.verdict == "accepted"


LEAK = "rejected_by:leak"
"""The verdict of the evaluator, who knows what is held out."""

CUT = "cut before it began"
"""What the detail of an attempt says whose tokens were spent before the answer's first word."""

TRANSPORT_OUTCOMES = frozenset({"timeout", "rate_limited", "server_error", "unreachable", "dropped", "not_an_answer"})
"""Outcomes of the wire, not of an answer: in virtual time none of them may remain (the run stops, resumably)."""

NOT_RECEIVED = "not_received"
"""The verdict on a sample that the cloud wrote and that never reached its device."""


class Part(NamedTuple):
    """The name of a group of rows that a pass of a round left in the devices' store."""

    round: int
    name: str
