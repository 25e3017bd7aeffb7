"""Replay: real histories that move through rounds, so that an author's calendar happens again, one round at a time.

Test, then train: an item that is shaped like a query is first asked, in the round of its date, and known from a later
round on. A date that is a month or a year stands for all its days: it is asked on the last of them, and it is history
only when the last of them is over and every query that is not surely later has been asked.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from untether.sim.core.records import Exclusion, Interaction, Query, User
from untether.sim.population.dates import first_day, last_day, strictly_earlier
from untether.sim.population.leaks import normalize
from untether.sim.population.order import CalendarKey, Collected, by_end, told_apart, unique_ids, visible_before
from untether.sim.population.tasks import get_task


class Replay(NamedTuple):
    """How many rounds there are, and how many days of the real calendar each stands for."""

    rounds: int
    round_days: float

    def round_of(self, day: int, start: int) -> int:
        """Returns the round that a day falls into, where round 0 begins on day `start`."""
        return int((day - start) // self.round_days)


@dataclass
class Outlook:
    """Facts about a user's questions of a task, without texts, which tell whether they can be replayed.

    (Questions that repeat a text are found only when the user is loaded.)
    """

    min_history: int
    replay: Replay
    earliest: dict[int, int] = field(default_factory=dict)
    asked: set[CalendarKey] = field(default_factory=set)

    def see(self, query: Query, key: CalendarKey, profile: list[tuple[Interaction, CalendarKey]]) -> None:
        """Adds the facts of one question and its profile."""
        dated = {hash(identity): item_key for identity, _, item_key in told_apart(profile) if item_key}
        self.earliest |= {identity: last_day(item_key) for identity, item_key in dated.items()}
        self.earliest = dict(heapq.nsmallest(self.min_history, self.earliest.items(), key=lambda pair: pair[1]))
        self.asked.update(item_key for item, item_key in profile if item_key and item.form == "query")
        self.asked.update([key] if key else [])

    def lacks(self) -> str:
        """Returns why the user cannot be replayed in this task; empty if it can."""
        if len(self.earliest) < self.min_history:
            return "too little history"
        start = max(self.earliest.values()) + 1
        later = (key for key in self.asked if first_day(key) >= start)
        if not any(self.replay.round_of(last_day(key), start) < self.replay.rounds for key in later):
            return "no later query in the rounds"
        return ""


@dataclass
class _Course:
    """One task of a user: its dated items and questions, in order of time."""

    task: str
    items: list[tuple[Interaction, CalendarKey]]
    questions: list[tuple[Query, CalendarKey]]

    def start(self, min_history: int) -> int | None:
        """The first day that has so many items strictly before it."""
        ends = sorted(last_day(key) for _, key in self.items)
        return ends[min_history - 1] + 1 if len(ends) >= min_history else None

    def asked(
        self, start: int, most: int, replay: Replay, exclusions: list[Exclusion]
    ) -> list[tuple[Query, CalendarKey]]:
        """The queries, each with its round: a text the first time that it is seen, if that is on `start` or later."""
        labels, seen, kept = get_task(self.task).labels, set(), []
        for query, key, of_file in self._candidates():
            text, reason = normalize(query.input), ""
            if text in seen or first_day(key) < start:
                reason = "question repeats a text" if text in seen else "question from before the first round"
                reason = reason if of_file else ""  # an item is history all the same
            elif labels and query.gold not in labels:
                reason = "gold is no label of the task"
            elif (round := replay.round_of(last_day(key), start)) >= replay.rounds:
                reason = "query after the last round"
            elif len(kept) == most:
                reason = "more queries than population.queries"
            else:
                kept.append((replace(query, round=round), key))
            seen.add(text)
            if reason:
                exclusions.append(Exclusion(reason, f"{self.task} {query.query_id}"))
        return kept

    def _candidates(self) -> list[tuple[Query, CalendarKey, bool]]:
        """(query, key, whether it is a question of the file) of all that could be asked, in the order of asking; where
        an item tells the same on the same day, the file's own question comes first.
        """
        items = [
            (Query(f"ask-{item.item_id}", self.task, item.input, item.output, item.time_s), key, False)
            for item, key in self.items
            if item.form == "query"
        ]
        questions = [(query, key, True) for query, key in self.questions]
        return sorted(questions + items, key=lambda one: last_day(one[1]))


def assemble_replayed(
    user_id: str, collected: Mapping[str, Collected], min_history: int, most_queries: int, replay: Replay
) -> tuple[User, list[Exclusion]]:
    """Returns a user whose rounds begin on the first day that has `min_history` items of each task strictly before it.

    A task without enough history or without a query in the rounds is left out, and so are undated items and questions,
    and items after the last round.

    Args:
        user_id: The user.
        collected: The questions read, by task.
        min_history: Fewest items of a task before the first round.
        most_queries: Most queries of a task; the earliest are kept.
        replay: The rounds.

    Returns:
        The user, and what was left out with the reasons.
    """
    exclusions: list[Exclusion] = []
    courses = {task: _course(task, own, exclusions) for task, own in collected.items()}
    while courses:
        starts = {task: course.start(min_history) for task, course in courses.items()}
        start = max((day for day in starts.values() if day is not None), default=0)
        notes: list[Exclusion] = []
        asked = {task: course.asked(start, most_queries, replay, notes) for task, course in courses.items()}
        failing = [task for task in courses if starts[task] is None or not asked[task]]
        if not failing:
            queries = [pair for pairs in asked.values() for pair in pairs]
            return _user(user_id, courses.values(), queries, start, replay, exclusions), exclusions + notes
        # The latest to begin first: the others may have failed by having to wait for it.
        left_out = max(failing, key=lambda task: math.inf if starts[task] is None else starts[task])
        reason = "too little history" if starts[left_out] is None else "no later query in the rounds"
        exclusions.append(Exclusion(reason, f"{left_out} {user_id}"))
        del courses[left_out]
    return User(user_id, (), ()), exclusions


def _course(task: str, own: Collected, exclusions: list[Exclusion]) -> _Course:
    for item, key in own.items.values():
        if not key:
            exclusions.append(Exclusion("undated item in a dated history", f"{task} {item.item_id}"))
    for query, key in own.queries:
        if not key:
            exclusions.append(Exclusion("undated question", f"{task} {query.query_id}"))
    items = sorted((pair for pair in own.items.values() if pair[1]), key=lambda pair: by_end(pair[0]))
    named = unique_ids([item for item, _ in items])
    return _Course(task, list(zip(named, (key for _, key in items), strict=True)), [p for p in own.queries if p[1]])


def _user(
    user_id: str, courses: Iterable[_Course], queries: list[tuple[Query, CalendarKey]], start: int, replay: Replay,
    exclusions: list[Exclusion],
) -> User:  # fmt: skip
    """An item comes when its days are over and all queries that are not surely later, of any task, have been asked."""
    history: list[Interaction] = []
    asked: list[Query] = []
    for course in courses:
        items = []
        for item, key in course.items:
            blocked = [query.round for query, asked_on in queries if not strictly_earlier(key, asked_on)]
            round = 1 + max([-1, replay.round_of(last_day(key), start), *blocked])
            if round < replay.rounds:
                items.append((replace(item, round=round), key))
            else:
                exclusions.append(Exclusion("history item after the last round", f"{course.task} {item.item_id}"))
        keys = [key for _, key in items]
        history += [item for item, _ in items]
        own = [(query, key) for query, key in queries if query.task == course.task]
        asked += [replace(query, visible=visible_before(keys, key)) for query, key in own]
    return User(user_id, tuple(sorted(history, key=by_end)), tuple(asked))
