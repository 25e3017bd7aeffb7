"""Real users from LaMP's files: which users and queries are eligible, and which earlier items each may learn from.

The files are read twice and never held whole: once to find the eligible users, once to load those that were drawn.
Whether a result can be trusted depends on the order: a dated query sees only items of strictly earlier days, and an
undated set (`order_of` = "unknown") must at least not hold what is scored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from untether.sim.core.errors import UserError
from untether.sim.core.records import Exclusion, Interaction, Query, User
from untether.sim.core.seeding import derive
from untether.sim.population.dates import calendar_key, parse_date, strictly_earlier
from untether.sim.population.lamp_files import TaskFiles, find_files, read_golds, stream_questions
from untether.sim.population.leaks import scored_texts
from untether.sim.population.order import CalendarKey, Collected, assemble, one_shot_history, order_of, reveals
from untether.sim.population.replay import Outlook, Replay, assemble_replayed
from untether.sim.population.tasks import Task, clean_rating

__all__ = ["one_shot_history", "order_of", "read_lamp"]


def read_lamp(
    path: str | Path,
    tasks: Iterable[str] = (),
    split: str = "dev",
    users: int | None = None,
    seed_index: int = 0,
    *,
    skip: int = 0,
    draw_seed: int = 0,
    min_history: int = 3,
    queries: int = 10,
    fewer: bool = False,
    replay: Replay | None = None,
) -> tuple[list[User], list[Exclusion]]:
    """Reads users from the LaMP files of one task's folder or of a parent of several.

    Users are drawn by a seeded order of their ids: those at positions `skip + seed_index * users` and the following,
    `users` of them. So several seeds, and a pool for a shared adapter (`skip` = seeds x users), are disjoint.

    A user is a `user_id`, with several tasks where it appears in several folders; a question without one is a user of
    its own, `{task}-{question id}`. The history is the union of the profiles of the user's questions, in time order
    (file order where undated), later items included: `one_shot_history` is what a one-shot run may train on. Users and
    questions left out are listed for the whole source, history items that are scored for the users drawn.

    Args:
        path: A task's folder, or the parent of several.
        tasks: Which tasks; empty: all that are found.
        split: LaMP's split.
        users: How many users to draw; None: all.
        seed_index: Number of this seed among the run's seeds.
        skip: How many positions to skip.
        draw_seed: Of the order of ids.
        min_history: Fewest items that a user of a task must have.
        queries: Most queries a user and task; the earliest are kept.
        fewer: Whether the draw may return fewer users; otherwise too few eligible users are an error.
        replay: Makes users move through rounds (see `sim.population.replay`), which requires dated files.

    Returns:
        The users, and what was left out with the reasons.

    Raises:
        UserError: A file is missing, malformed or inconsistent (see `lamp_files`), a gold has no question, a profile
            lacks a field that the task needs, or a date does not parse.
    """
    sources = find_files(path, tuple(tasks), split)
    golds = {files.task.name: read_golds(files) for files in sources}
    exclusions: list[Exclusion] = []
    eligible: dict[str, set[str]] = defaultdict(set)
    for files in sources:
        for user_id in _eligible(files, golds[files.task.name], min_history, exclusions, replay):
            eligible[user_id].add(files.task.name)
    needs = _needs(min_history, replay)
    without = sum(one.reason in (NO_GOLD, NO_LABEL) for one in exclusions)
    if without and not eligible:
        needs += f" and a question with a usable gold ({without} questions have none, or one that is no label)"
    drawn = _draw(sorted(eligible), users, skip, seed_index, draw_seed, fewer, path, needs)
    collected: dict[str, dict[str, Collected]] = {user_id: {} for user_id in drawn}
    for files in sources:
        _load(files, golds[files.task.name], {u for u in drawn if files.task.name in eligible[u]}, collected)
    loaded = []
    for user_id in drawn:
        if replay:
            user, left_out = assemble_replayed(user_id, collected[user_id], min_history, queries, replay)
        else:
            user, left_out = assemble(user_id, collected[user_id], min_history, queries)
        exclusions += left_out
        if user.queries:
            loaded.append(user)
    return loaded, list(dict.fromkeys(exclusions))


NO_GOLD, NO_LABEL = "question without gold", "gold is no label of the task"


class _OneShot:
    """What the first pass keeps of a user's task: for each question how many items it may see, up to enough."""

    def __init__(self, min_history: int) -> None:
        self._min_history = min_history
        self._seen: list[tuple[float | None, int]] = []

    def see(self, query: Query, key: CalendarKey, profile: list[tuple[Interaction, CalendarKey]]) -> None:
        scored = set() if key else set(scored_texts(query))
        usable = (1 for item, k in profile if (strictly_earlier(k, key) if key else not reveals(item, scored)))
        self._seen.append((query.time_s, sum(islice(usable, self._min_history))))

    def lacks(self) -> str:
        """Looks at what the earliest question sees; over all of them where one is undated."""
        dates = [time_s for time_s, _ in self._seen]
        earliest = None if None in dates else min(dates)
        most = max(count for time_s, count in self._seen if earliest in (None, time_s))
        return "too little history" if most < self._min_history else ""


def _eligible(
    files: TaskFiles, golds: dict[str, str | None], min_history: int, exclusions: list[Exclusion], replay: Replay | None
) -> list[str]:
    """First pass: the users with enough history before what they are asked."""
    task = files.task
    seen: dict[str, _OneShot | Outlook] = {}
    asked: set[str] = set()
    dated = False
    unusable: list[str] = []
    for question in stream_questions(files):
        asked.add(question["id"])
        if (gold := golds.get(question["id"])) is None:
            exclusions.append(Exclusion(NO_GOLD, f"{task.name} {question['id']}"))
            unusable.append(f"question {question['id']!r} has no gold")
            continue
        query, key = _query(files, question, gold)
        if task.labels and query.gold not in task.labels:
            exclusions.append(Exclusion(NO_LABEL, f"{task.name} {question['id']}: {gold!r}"))
            unusable.append(f"the gold {gold!r} of question {question['id']!r} is no label of {task.name}")
            continue
        profile = _profile(files, question, exclusions)
        dated = dated or any(item_key for _, item_key in profile)
        judge = Outlook(min_history, replay) if replay else _OneShot(min_history)
        seen.setdefault(_user_id(task, question), judge).see(query, key, profile)
    if strangers := sorted(golds.keys() - asked):
        raise UserError(
            f"{files.outputs}: {len(strangers)} golds without a question in {files.questions.name}, the first is "
            f"{strangers[0]!r}: both files must be of the same split; remove it or download both again"
        )
    if not seen and unusable:
        labels = f" Its labels are {', '.join(task.labels)}." if task.labels else ""
        raise UserError(
            f"{files.outputs}: no question of {task.name} can be scored: {unusable[0]}, and the same of all "
            f"{len(unusable)}.{labels} Give each question its gold as the task writes it"
        )
    if replay and seen and not dated:
        raise UserError(
            f"{files.questions}: population.replay = true, but no history item has a date, and replay needs dates. Set "
            f"population.replay = false, or name dated tasks alone in population.tasks (without {task.name})"
        )
    lacking = {user_id: own.lacks() for user_id, own in seen.items()}
    exclusions += [Exclusion(reason, f"{task.name} {user_id}") for user_id, reason in lacking.items() if reason]
    return [user_id for user_id, reason in lacking.items() if not reason]


def _load(
    files: TaskFiles, golds: dict[str, str | None], asked: set[str], into: dict[str, dict[str, Collected]]
) -> None:
    """Second pass: the questions of the drawn users alone."""
    task = files.task
    for question in stream_questions(files) if asked else ():
        user_id, gold = _user_id(task, question), golds.get(question["id"])
        if user_id in asked and gold is not None:
            query, key = _query(files, question, gold)
            if not task.labels or query.gold in task.labels:
                own = into[user_id].setdefault(task.name, Collected())
                own.add(query, key, _profile(files, question, []))


def _draw(
    ids: list[str], users: int | None, skip: int, seed_index: int, draw_seed: int, fewer: bool, path: object, needs: str
) -> list[str]:
    """Rank ids by a hash of (draw_seed, id), so that adding an id moves no other one's place relative to a third."""
    ranked = sorted(ids, key=lambda user_id: (derive(draw_seed, "lamp", "user", user_id), user_id))
    if not ranked:
        raise UserError(f"population.path = {str(path)!r}: no user has {needs}")
    start = skip + seed_index * (users or 0)
    stop = len(ranked) if users is None else start + users
    if stop > len(ranked) and not fewer:
        raise UserError(
            f"population.users = {users}: seed number {seed_index + 1} draws users {start + 1} to {stop}, but "
            f"{path} has {len(ranked)} with at least {needs}. Ask for fewer users or seeds"
        )
    return ranked[start:stop]


def _needs(min_history: int, replay: Replay | None) -> str:
    needs = f"{min_history} items of history (population.min_history)"
    days = f"within {replay.rounds} rounds of {replay.round_days:g} days (population.round_days)" if replay else ""
    return f"{needs} and a later query {days}" if replay else needs


def _user_id(task: Task, question: dict) -> str:
    given = question.get("user_id")
    return f"{task.name}-{question['id']}" if given in (None, "") else str(given)


def _query(files: TaskFiles, question: dict, gold: str) -> tuple[Query, CalendarKey]:
    task, date = files.task, question.get("date")
    try:
        key, time_s = calendar_key(date), parse_date(date)
    except ValueError as error:
        raise UserError(f"{files.questions}: question {question['id']!r}: date: {error}") from None
    gold = clean_rating(gold) if task.kind == "rating" else task.spelled(gold.strip())
    return Query(question["id"], task.name, task.content(question["input"]), gold, time_s), key


def _profile(files: TaskFiles, question: dict, exclusions: list[Exclusion]) -> list[tuple[Interaction, CalendarKey]]:
    """A question's profile as training pairs with calendar keys; items that make no pair are counted."""
    pairs = []
    for position, item in enumerate(question["profile"]):
        where = f"{files.questions}: question {question['id']!r}, profile item {position + 1}"
        if not isinstance(item, dict):
            raise UserError(f"{where} is a {type(item).__name__}: expected an object with {_needed(files.task)}")
        for name in files.task.fields:
            if isinstance(item.get(name), (list, dict, bool)):
                kind = type(item[name]).__name__
                raise UserError(f"{where}: {name} is a {kind}: write one text, or null to leave the item out")
        try:
            made, key = files.task.interactions(item), calendar_key(item.get("date"))
        except KeyError as error:
            raise UserError(f"{where}: no field {error}; {files.task.name} needs {_needed(files.task)}") from None
        except ValueError as error:
            raise UserError(f"{where}: date: {error}") from None
        if not made:
            exclusions.append(Exclusion("history item without text", f"{files.task.name} {item.get('id', where)}"))
        pairs += [(one, key) for one in made]
    return pairs


def _needed(task: Task) -> str:
    return ", ".join(dict.fromkeys(task.fields))
