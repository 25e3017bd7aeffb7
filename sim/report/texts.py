"""Texts, as people read them: what filters kept and rejected beside the user's own, and what each arm answered."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import pyarrow.parquet as pq

from untether.sim.core.errors import UserError
from untether.sim.core.records import LEAK, NOT_RECEIVED
from untether.sim.experiment.arms import ordered
from untether.sim.population.source import device_id, open_population
from untether.sim.run.directory import RunDirectory

EXAMPLES = 2
"""Examples of each verdict and task."""

ASKED = 2
"""Queries of each task whose answers are shown."""

LOOKED_AT = 200
"""Devices whose answers are read for their lengths and repetitions."""

CHARS = 320
"""Most characters of a text that are shown."""


@dataclass(frozen=True, slots=True)
class SamplesBeside:
    """One user's samples of a task by verdict, beside items of the user's own. Texts are (input, output); `score` is
    what the rejecting filter said.
    """

    task: str
    user: str
    own: Sequence[tuple[str, str]]
    samples: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True, slots=True)
class Answered:
    """A query, what its user wrote, and the arms' answers with their scores."""

    task: str
    user: str
    input: str
    gold: str
    answers: Sequence[tuple[str, str, float]]


@dataclass(frozen=True, slots=True)
class Lengths:
    """An arm's answers to one task's queries: median and longest in words, the users' own median, the shares that are
    empty and that repeat themselves.
    """

    task: str
    arm: str
    n: int
    median: float
    longest: int
    own: float
    empty: float
    repeating: float


def repeats(text: str) -> bool:
    """Returns whether a text says the same again and again: three words in a row that occur at least three times and
    make up a third of it, or a word five times in a row.
    """
    words = re.findall(r"\w+", text.lower())
    if any(len(set(words[k : k + 5])) == 1 for k in range(len(words) - 4)):
        return True
    if len(words) < 9:
        return False
    most = Counter(zip(words, words[1:], words[2:], strict=False)).most_common(1)[0][1]
    return most >= 3 and 3 * most >= len(words) / 3


def lengths(run: RunDirectory) -> list[Lengths]:
    """Returns by task and arm, over the first devices of every seed."""
    frame = _some(run, "predictions", [device_id(index) for index in range(LOOKED_AT)])
    if not len(frame):
        return []
    found = []
    for task, of_task in frame.groupby("task", sort=True):
        own = of_task.drop_duplicates(["seed", "query_id"])["gold"].map(_words)
        for arm in ordered(of_task["arm"]):
            answers = of_task[of_task["arm"] == arm]["prediction"].fillna("")
            counts = answers.map(_words)
            found.append(Lengths(
                str(task), arm, len(answers), float(counts.median()), int(counts.max()), float(own.median()),
                float((counts == 0).mean()), float(answers.map(repeats).mean()),
            ))  # fmt: skip
    return found


def free_text(found: Sequence[Lengths]) -> list[Lengths]:
    """Returns those of tasks in which users write more than a word or two: a label's length says nothing."""
    return [row for row in found if row.own > 2]


def samples_beside(run: RunDirectory) -> list[SamplesBeside]:
    """Returns for each task, one user's samples of every verdict beside the user's own items."""
    devices = [device_id(index) for index in range(8)]
    frame = _some(run, "samples", devices)
    if not len(frame):
        return []
    frame = frame[(frame["seed"] == run.experiment.seeds[0]) & (frame["verdict"] != NOT_RECEIVED)]
    return [_beside(run, str(task), rows) for task, rows in frame.groupby("task", sort=True)]


def _beside(run: RunDirectory, task: str, rows: pd.DataFrame) -> SamplesBeside:
    by_device = rows.groupby("device_id")["verdict"].nunique()
    chosen = by_device.idxmax()  # whose samples met the most fates
    mine = rows[rows["device_id"] == chosen]
    samples = []
    for verdict in sorted(mine["verdict"].unique(), key=lambda name: (name != "accepted", name)):
        for _, row in mine[mine["verdict"] == verdict].head(EXAMPLES).iterrows():
            samples.append((verdict, short(row["input"]), short(row["output"]), _score(row)))
    return SamplesBeside(task, str(mine["user_id"].iloc[0]), _own(run, str(chosen), task), samples)


def _score(row: Mapping[str, object]) -> str:
    column = {"semantic": "semantic", "diversity": "diversity", "length": "length_ratio"}
    name = str(row["verdict"]).removeprefix("rejected_by:")
    value = row.get(column.get(name, ""))
    return f"{value:.2f}" if isinstance(value, float) and value == value and name != LEAK else ""


def _own(run: RunDirectory, device: str, task: str) -> list[tuple[str, str]]:
    """Items of the user's own history; none where the data are not there any more."""
    try:
        user = open_population(run.experiment, run.experiment.seeds[0]).user(int(device[1:]))
    except (UserError, OSError, IndexError):
        return []
    return [(short(item.input), short(item.output)) for item in user.of_task(task)[-2 * EXAMPLES :]]


def answers(run: RunDirectory) -> list[Answered]:
    """Returns for each task, the arms' answers to some queries: those on which the arms disagree most."""
    frame = _some(run, "predictions", [device_id(index) for index in range(8)])
    return [one for task, rows in frame.groupby("task", sort=True) for one in _answers(rows)] if len(frame) else []


def _answers(rows: pd.DataFrame) -> Iterator[Answered]:
    rows = rows.sort_values("round", kind="stable").drop_duplicates(["seed", "query_id", "arm"], keep="last")
    spread = rows.groupby(["seed", "query_id"])["score"].std().fillna(0.0).sort_values(ascending=False, kind="stable")
    for seed, query in spread.index[:ASKED]:
        own = rows[(rows["seed"] == seed) & (rows["query_id"] == query)]
        first = own.iloc[0]
        by_arm = {row["arm"]: (short(row["prediction"]), float(row["score"])) for _, row in own.iterrows()}
        yield Answered(
            str(first["task"]), str(first["user_id"]), short(first["input"]), short(first["gold"]),
            [(arm, *by_arm[arm]) for arm in ordered(by_arm)],
        )  # fmt: skip


def short(text: object) -> str:
    """Returns at most `CHARS` characters of a text; of none, nothing."""
    if not isinstance(text, str):
        return ""
    return text if len(text) <= CHARS else text[: CHARS - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _words(text: str) -> int:
    return len(text.split())


def _some(run: RunDirectory, table: str, devices: Sequence[str]) -> pd.DataFrame:
    """Rows of some devices; none of those whose texts stayed there (a deployment)."""
    try:
        rows = pq.read_table(run.path / f"{table}.parquet", filters=[("device_id", "in", list(devices))]).to_pandas()
    except FileNotFoundError:
        return pd.DataFrame()
    return rows[rows["gold" if table == "predictions" else "output"].notna()]
