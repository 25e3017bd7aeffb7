"""The rules of order, which decide what a query may see and so whether a result on real histories can be trusted.

Dated: a query sees items of strictly earlier days only, and a date that is a month or a year alone stands for all its
days, so its item is seen when the last of them is over. Undated: nothing that is scored may be in training, and the
order is reported as unknown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from untether.sim.core.clock import DAY_S
from untether.sim.core.records import Exclusion, Interaction, Query, User
from untether.sim.population.dates import strictly_earlier
from untether.sim.population.leaks import normalize, scored_texts
from untether.sim.population.tasks import get_task

CalendarKey = tuple[int, ...]
_UNDATED = -float("inf")


def one_shot_history(user: User, task: str, most: int = 0) -> tuple[Interaction, ...]:
    """Returns what a one-shot run may train on, retrieve or upload for a task: what the user's earliest query may see.

    Earliest over all the user's dated tasks, because one adapter and one history serve them all: another task's query
    may ask about the very item. `most` keeps the latest so many (0: all).
    """
    visible = [query.visible for query in user.queries if query.task == task and query.visible is not None]
    items = user.of_task(task)
    items = items[: min(visible)] if visible else items
    dates = [query.time_s for query in user.queries if query.time_s is not None]
    if dates:
        first_s = min(dates)
        items = tuple(item for item in items if item.time_s is None or over_before(item, first_s))
    return items[-most:] if most else items


def over_s(item: Interaction) -> float | None:
    """Returns the midnight after the last day that a dated item may be of; None if undated."""
    if item.time_s is None or item.until_s is not None:
        return item.until_s
    return (item.time_s // DAY_S + 1) * DAY_S


def over_before(item: Interaction, time_s: float) -> bool:
    """Returns whether an item is surely of an earlier day than a moment. False if undated."""
    end_s = over_s(item)
    return end_s is not None and end_s <= time_s // DAY_S * DAY_S


def known_history(user: User, task: str, round: int, most: int = 0) -> tuple[Interaction, ...]:
    """Returns what a device has of a task in a round: `one_shot_history` or, in a replay, the items known by then.

    A replayed item becomes known (`Interaction.round`) when every query that is not strictly later has been asked, so
    nothing here is as late as a query of this round or a later one. `most` keeps the latest so many (0: all).
    """
    if not replayed(user):
        return one_shot_history(user, task, most)
    items = tuple(item for item in user.of_task(task) if item.round <= round)
    return items[-most:] if most else items


def asked(user: User, round: int) -> tuple[Query, ...]:
    """Returns the queries of a round: those that belong to it, and those that are asked in every one."""
    return tuple(query for query in user.queries if query.round in (None, round))


def replayed(user: User) -> bool:
    """Returns whether the user moves through rounds of time."""
    return any(query.round is not None for query in user.queries)


def latest_s(items: Iterable[Interaction]) -> float | None:
    """Returns the date of the latest item: of a month or a year alone, its last day. None where nothing is dated."""
    ends = ((item.time_s, item.until_s) for item in items if item.time_s is not None)
    return max((begin_s if end_s is None else end_s - DAY_S for begin_s, end_s in ends), default=None)


def order_of(user: User, task: str | None = None) -> str:
    """Returns "time" where every query (of a task) is dated, so that its earlier items are known; otherwise "unknown".
    """
    asked = [query for query in user.queries if task in (None, query.task)]
    return "time" if asked and all(query.time_s is not None for query in asked) else "unknown"


def reveals(item: Interaction, scored: set[str]) -> bool:
    """Returns whether a history item holds a scored text (`sim.population.leaks.scored_texts`). Its label never counts.
    """
    texts = [item.input, f"{item.input} {item.output}"]
    if item.form != "query" or get_task(item.task).kind == "generation":
        texts.append(item.output)
    return bool(scored) and any(normalize(text) in scored for text in texts)


@dataclass(slots=True)
class Collected:
    """One user's questions of one task, as read: queries with calendar keys, and the union of their profiles."""

    queries: list[tuple[Query, CalendarKey]] = field(default_factory=list)
    items: dict[tuple, tuple[Interaction, CalendarKey]] = field(default_factory=dict)

    def add(self, query: Query, key: CalendarKey, profile: list[tuple[Interaction, CalendarKey]]) -> None:
        """Adds a question, and the items of its profile that are new."""
        self.queries.append((query, key))
        for identity, item, item_key in told_apart(profile):
            self.items.setdefault(identity, (item, item_key))

    @property
    def dated(self) -> bool:
        """Whether every query is dated."""
        return all(key for _, key in self.queries)


def told_apart(profile: Iterable[tuple[Interaction, CalendarKey]]) -> Iterator[tuple[tuple, Interaction, CalendarKey]]:
    """Yields the items of one profile with what identifies each: content and date, not id. Twice in one is two items.
    """
    copies: dict[tuple, int] = defaultdict(int)
    for item, key in profile:
        same = (item.input, item.output, item.time_s, item.until_s)
        copies[same] += 1
        yield (*same, copies[same]), item, key


def assemble(
    user_id: str, collected: Mapping[str, Collected], min_history: int, most_queries: int
) -> tuple[User, list[Exclusion]]:
    """Returns a user of one or more tasks: items and queries in time order, and how many items each query sees.

    Where no date decides (the item's task or the query's is undated), an item that holds what a query is scored by,
    kept or not, is left out. A task is left out if its `one_shot_history` has fewer than `min_history` items.

    Args:
        user_id: The user.
        collected: The questions read, by task.
        min_history: Fewest items of a task.
        most_queries: Most queries of a task; the earliest are kept.

    Returns:
        The user, and what was left out with the reasons.
    """
    history: list[Interaction] = []
    queries: list[Query] = []
    exclusions: list[Exclusion] = []
    for task, own in collected.items():
        scored = {
            text
            for other in collected.values()
            if not (own.dated and other.dated)
            for query, _ in other.queries
            for text in scored_texts(query)
        }
        items = []
        for item, key in own.items.values():
            if own.dated and not key:
                exclusions.append(Exclusion("undated item in a dated history", f"{task} {item.item_id}"))
            elif reveals(item, scored):
                exclusions.append(Exclusion("history item is scored (order unknown)", f"{task} {item.item_id}"))
            else:
                items.append((item, key))
        items.sort(key=lambda pair: by_end(pair[0]))
        asked = sorted(own.queries, key=lambda pair: by_time(pair[0])) if own.dated else own.queries
        for query, _ in asked[most_queries:]:
            exclusions.append(Exclusion("more queries than population.queries", f"{task} {query.query_id}"))
        keys = [key for _, key in items]
        kept = [replace(q, visible=visible_before(keys, key) if own.dated else None) for q, key in asked[:most_queries]]
        history += unique_ids([item for item, _ in items])
        queries += kept
    user = User(user_id, tuple(sorted(history, key=by_end)), tuple(queries))
    while lacking := [task for task in user.tasks if len(one_shot_history(user, task)) < min_history]:
        exclusions.append(Exclusion("too little history", f"{lacking[0]} {user_id}"))
        user = _without(user, lacking[0])
    return user, exclusions


def _without(user: User, task: str) -> User:
    return replace(
        user,
        history=tuple(item for item in user.history if item.task != task),
        queries=tuple(query for query in user.queries if query.task != task),
    )


def by_time(query: Query) -> float:
    """Returns a key that sorts queries by time: the undated first, in the order of the file."""
    return _UNDATED if query.time_s is None else query.time_s


def by_end(item: Interaction) -> tuple[float, float]:
    """Returns a key that sorts a history by when each item is surely over: items that a query may see come first.

    The undated precede them, in the order of the file.
    """
    end_s = over_s(item)
    return (_UNDATED, _UNDATED) if end_s is None or item.time_s is None else (end_s, item.time_s)


def visible_before(keys: list[CalendarKey], before: CalendarKey) -> int:
    """Returns how many leading items are strictly earlier (of a history in the order `by_end`: all that are)."""
    return next((place for place, key in enumerate(keys) if not strictly_earlier(key, before)), len(keys))


def unique_ids(items: list[Interaction]) -> list[Interaction]:
    """Returns the items with distinct ids: a repeated or missing id gets its place in the history after a tilde."""
    seen: set[str] = set()
    named = []
    for place, item in enumerate(items):
        if not item.item_id or item.item_id in seen:
            item = replace(item, item_id=f"{item.item_id}~{place}")
        seen.add(item.item_id)
        named.append(item)
    return named
