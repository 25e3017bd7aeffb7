"""Anybody's data: one interaction a line (user, time, input, output), and a task that the experiment declares.

A user's interactions are split in time: the last ones are asked, those before are history. Reading, order and leaks are
those of LaMP's files (`sim.population.order`), so everything that holds there holds here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from untether.sim.core import strict_json
from untether.sim.core.errors import UserError, unknown
from untether.sim.core.kinds import TASKS
from untether.sim.core.records import Exclusion, Interaction, Query, User
from untether.sim.core.seeding import derive
from untether.sim.core.text import shown, valid
from untether.sim.experiment import Experiment
from untether.sim.population.dates import calendar_key, date_span, parse_date
from untether.sim.population.order import CalendarKey, Collected, assemble, order_of
from untether.sim.population.replay import Replay, assemble_replayed
from untether.sim.population.source import Population
from untether.sim.population.tasks import Task, clean_rating

FIELDS = ("user", "time", "input", "output", "task", "split", "id")
"""What a line may say; `user`, `input` and `output` it must."""

NO_LABEL = "output is no label of the task"

MOST_ASKED = 0.5
"""Of a user's interactions of a task without a `split`, at most this share is asked."""


class JsonLine(NamedTuple):
    """One interaction, as read. `split`: `history`, `query`, or empty where time decides."""

    user: str
    task: str
    item_id: str
    input: str
    output: str
    date: Any
    split: str
    where: str


@dataclass
class FromJsonl(Population):
    """Users of a JSONL file, or of all `.jsonl` files of a folder; each seed draws its own."""

    experiment: Experiment
    seed: int
    left_out: list[Exclusion] = field(default_factory=list)

    @cached_property
    def _users(self) -> list[User]:
        population = self.experiment.population
        eligible = self.everybody
        start = self.experiment.seeds.index(self.seed) * population.users
        stop = start + population.users
        if stop > len(eligible):
            raise UserError(
                f"population.users = {population.users}: seed {self.seed} draws users {start + 1} to {stop}, but "
                f"{population.path} has {len(eligible)} with {population.min_history} items before their first query"
                f"{self._missing()}. Ask for fewer users or seeds"
            )
        return eligible[start:stop]

    def _missing(self) -> str:
        """What was left out most often, and where first, for a message."""
        found = [one for one in dict.fromkeys(self.left_out) if one.reason == NO_LABEL]
        return f", and {len(found)} were left out: {NO_LABEL} ({shown(found[0].what, 300)})" if found else ""

    @cached_property
    def everybody(self) -> list[User]:
        """Everybody who can be asked something, in the order of the draw."""
        population = self.experiment.population
        default = self.experiment.task.name
        by_user: dict[str, list[JsonLine]] = defaultdict(list)
        for line in read_lines(population.path, default):
            if not population.tasks or line.task in population.tasks:
                by_user[line.user].append(line)
        users = []
        for name in sorted(by_user, key=lambda user: (derive(0, "jsonl", "user", user), user)):
            user, left_out = self._user(name, by_user[name])
            self.left_out += left_out
            if user.queries:
                users.append(user)
        return users

    def _user(self, name: str, lines: list[JsonLine]) -> tuple[User, list[Exclusion]]:
        population = self.experiment.population
        collected: dict[str, Collected] = {}
        left_out: list[Exclusion] = []
        for task in sorted({line.task for line in lines}):
            own = [line for line in lines if line.task == task]
            collected[task] = _collect(TASKS.get(task), name, own, population.queries, left_out)
        collected = {task: own for task, own in collected.items() if own.queries}
        if population.replay:
            replay = Replay(self.experiment.rounds, population.round_days)
            user, more = assemble_replayed(name, collected, population.min_history, population.queries, replay)
        else:
            user, more = assemble(name, collected, population.min_history, population.queries)
        return user, [*left_out, *more]

    def __len__(self) -> int:
        return len(self._users)

    def user(self, index: int) -> User:
        return self._users[index]

    @property
    def order(self) -> str:
        return "time" if all(order_of(user) == "time" for user in self._users) else "unknown"

    def shared_users(self) -> list[User]:
        drawn = self.experiment.population.users * len(self.experiment.seeds)
        return self.everybody[drawn : drawn + self.experiment.population.shared_users]

    def exclusions(self) -> Counter[str]:
        _ = self.everybody
        return Counter(item.reason for item in dict.fromkeys(self.left_out))


def read_lines(path: str | Path, default_task: str = "") -> Iterator[JsonLine]:
    """Yields the lines of a file or of a folder's `.jsonl` files. Raises UserError naming file and line for what is
    wrong.
    """
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(root.glob("*.jsonl")) if root.is_dir() else []
    if not files:
        raise UserError(f"population.path = `{path}`: no .jsonl file there. Give a file, or a folder of them")
    for file in files:
        with file.open(encoding="utf-8-sig") as lines:
            try:
                for number, text in enumerate(lines, 1):
                    if text.strip():
                        yield _line(f"{file}, line {number}", text, default_task, f"{file.stem}-{number}")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8: {error}. Save it as UTF-8") from None


def _line(where: str, text: str, default_task: str, item_id: str) -> JsonLine:
    try:
        found = strict_json.loads(text)
    except ValueError as error:
        why = str(error).removeprefix("line 1: ")
        raise UserError(f"{where}: not JSON: {why}. A line is an object with user, time, input, output") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is a {type(found).__name__}: give an object with user, time, input, output")
    if strange := sorted(found.keys() - set(FIELDS)):
        raise UserError(f"{where}: unknown field `{strange[0]}`. Known: {', '.join(FIELDS)}")
    for name in ("user", "input", "output"):
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise UserError(f"{where}: {name} = {value!r}: must be text. Leave the line out where there is none")
    for name in ("task", "split", "id"):
        if not isinstance(found.get(name), (str, int, type(None))):
            raise UserError(f"{where}: {name} = {shown(repr(found[name]), 60)}: must be text, or be left out")
    task, split = str(found.get("task") or default_task), str(found.get("split") or "")
    if not task:
        raise UserError(f"{where}: no task. Name one in the line, or declare one in the experiment: task.name")
    if task not in TASKS:
        raise UserError(f"{where}: {unknown('task', task, TASKS)}. Declare one of your own: task.name")
    if split not in ("", "history", "query"):
        raise UserError(f"{where}: split = `{split}`: must be `history` or `query`, or be left out")
    date = found.get("time")
    try:
        calendar_key(date)
        parse_date(date)
    except ValueError as error:
        raise UserError(f"{where}: time: {error}") from None
    words = (valid(str(found[name])).strip() for name in ("input", "output"))
    return JsonLine(str(found["user"]), task, str(found.get("id") or item_id), *words, date, split, where)


def _collect(
    task: Task, user: str, lines: list[JsonLine], most_queries: int, left_out: list[Exclusion]
) -> Collected:
    """A user's interactions of one task as LaMP has them: queries, each with all others as its profile."""
    kept = []
    for line in lines:
        output = clean_rating(line.output) if task.kind == "rating" else task.spelled(line.output)
        if task.labels and output not in task.labels:
            left_out.append(Exclusion(NO_LABEL, f"{task.name} {line.where}: {line.output!r}"))
            continue
        kept.append(line._replace(output=output))
    ids: dict[str, str] = {}
    for line in kept:
        if ids.setdefault(line.item_id, line.where) != line.where:
            raise UserError(
                f"{line.where}: id {shown(line.item_id, 60)!r} is that of {ids[line.item_id]} too. Give each of a "
                "user's interactions an id of its own, or none"
            )
    asked = [line for line in kept if line.split == "query"]
    if not any(line.split for line in kept):
        asked = _latest(kept, most_queries)
    taken = {line.item_id for line in asked}
    profile = [_item(task, line) for line in kept if line.item_id not in taken]
    collected = Collected()
    for place, line in enumerate(asked):
        earlier = [_item(task, other) for other in asked[:place] if other.date is not None]
        query = Query(f"{user}-{line.item_id}", task.name, line.input, line.output, parse_date(line.date))
        collected.add(query, calendar_key(line.date), [*profile, *earlier])
    return collected


def _latest(lines: list[JsonLine], most: int) -> list[JsonLine]:
    """What is asked where no line says: the latest by time (in the file's order where nothing is dated)."""
    dated = [line for line in lines if calendar_key(line.date)]
    among = sorted(dated, key=lambda line: parse_date(line.date) or 0.0) if dated else lines
    count = min(most, int(len(among) * MOST_ASKED))
    return among[len(among) - count :]


def _item(task: Task, line: JsonLine) -> tuple[Interaction, CalendarKey]:
    time_s, until_s = date_span(line.date)
    item = Interaction(line.item_id, task.name, line.input, line.output, time_s, task.item_form, until_s=until_s)
    return item, calendar_key(line.date)
