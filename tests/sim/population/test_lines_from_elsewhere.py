"""JSON lines as programs of others write them: read rightly, or refused with file, line and rule."""

from __future__ import annotations

import json

import pytest

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.population.dates import parse_date
from untether.sim.population.formats.convert import read_records
from untether.sim.population.source import open_population

WORDS = {"name": "greeting", "instruction": "Greet as this person would: {content}", "max_new_tokens": 12}
KINDS = {"name": "genre", "instruction": "Which genre is {content}?", "kind": "label", "labels": ["comedy", "action"]}
ROWS = [
    {"user": "ann", "time": f"2024-03-{day:02d}", "input": f"in {day}", "output": f"out {day}"} for day in range(1, 11)
]  # fmt: skip


def written(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def user_of(path, text, task=WORDS):
    path.write_text(text, encoding="utf-8")
    population = {"source": "jsonl", "path": str(path), "users": 1, "min_history": 2}
    return open_population(Experiment.build({"task": task, "population": population}, None, "the test"), 1).user(0)


def first(**fields):
    return written([{**ROWS[0], **fields}, *ROWS[1:]])


WRONG = {
    "NaN": (first(output=float("nan")), "NaN is no JSON value"), "nested": ("[" * 5000, "nested deeper"),
    "many digits": (f'{{"user": "a", "input": "x", "output": {"9" * 5000}}}', "a number of 5000 digits"),
    "an id that is a list": (first(id=["a"]), "id = .*must be text"),
    "a task that is a list": (first(task=["a"]), "task = .*must be text"),
    "a moment in nanoseconds": (first(time=1420070400000000000), "reads as nanoseconds: divide by"),
    "the same in quotes": (first(time="1420070400000000000"), "reads as nanoseconds: divide by"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_what_is_no_line_is_refused_with_its_place(tmp_path, text, said):
    with pytest.raises(UserError, match=f"data.jsonl, line 1: .*{said}"):
        user_of(tmp_path / "data.jsonl", text)


def test_two_lines_with_one_id_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 2: id 'same' is that of .*line 1 too. Give each"):
        user_of(tmp_path / "data.jsonl", written([{**row, "id": "same"} for row in ROWS]))


def test_a_byte_order_mark_and_half_a_character_are_read(tmp_path):
    user = user_of(tmp_path / "data.jsonl", "\ufeff" + written([{**row, "output": "half \ud83d"} for row in ROWS]))
    assert {query.gold for query in user.queries} == {"half \ufffd"}


def test_labels_in_another_case_are_labels(tmp_path):
    rows = [{**row, "output": "Comedy" if place % 2 else "ACTION"} for place, row in enumerate(ROWS)]
    user = user_of(tmp_path / "data.jsonl", written(rows), KINDS)
    assert {query.gold for query in user.queries} == {"comedy", "action"}


def test_outputs_that_are_no_label_are_to_blame_and_not_the_history(tmp_path):
    with pytest.raises(UserError, match=r"10 were left out: output is no label of the task \(genre.*line 1: 'out 1'"):
        user_of(tmp_path / "data.jsonl", written(ROWS), KINDS)


@pytest.mark.parametrize(("text", "seconds"), [("1420070400", 1420070400.0), ("20150101", 1420070400.0)])
def test_digits_in_quotes_are_a_day_or_a_moment(text, seconds):
    assert parse_date(text) == seconds


def test_a_line_separator_within_a_text_ends_no_line(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"a": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_records(file)) == [{"a": "one\u2028two"}]
