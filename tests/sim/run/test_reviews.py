"""Decisions on a disk: kept line by line, taken back, cut short by a crash."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.core.errors import UserError
from untether.sim.run.reviews import DECISIONS, Reviewed, ReviewFile

A, B = Reviewed("u", "LaMP_4", "one", "1"), Reviewed("u", "LaMP_4", "one", "2")


def test_a_decision_is_on_the_disk_at_once(tmp_path):
    path = tmp_path / "reviews.jsonl"
    reviews = ReviewFile(path)
    reviews.decide(A, "accept")
    assert ReviewFile(path).decision(A) == "accept" and ReviewFile(path).decision(B) is None
    reviews.decide(A, "reject")
    reviews.decide(B, "skip")
    reviews.undo(A)
    again = ReviewFile(path)
    assert dict(again.items()) == {B: "skip"} and len(again) == 1
    kept = [json.loads(line)["decision"] for line in path.read_text().splitlines()]
    assert kept == ["accept", "reject", "skip", "undone"]


def test_a_line_cut_short_by_a_crash_is_no_decision(tmp_path):
    path = tmp_path / "reviews.jsonl"
    ReviewFile(path).decide(A, "accept")
    whole = path.read_text()
    path.write_text(whole + '{"user_id": "u", "task')
    assert dict(ReviewFile(path).items()) == {A: "accept"}
    path.write_text('{"user_id": "u", "task\n' + whole)
    with pytest.raises(UserError, match=r"line 1: no decision of a review. A line is a JSON object with user_id"):
        ReviewFile(path)


@pytest.mark.parametrize(
    "row",
    [
        "[1]", "3", '{"decision": "accept"}',
        '{"user_id": 1, "task": "t", "input": "i", "output": "o", "decision": "accept"}',
        '{"user_id": "u", "task": "t", "input": "i", "output": "o", "decision": "perhaps"}',
    ],
)  # fmt: skip
def test_another_file_is_told(tmp_path, row):
    path = tmp_path / "other.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(UserError, match=r"other.jsonl, line 1"):
        ReviewFile(path)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([*DECISIONS, "undo"])), max_size=12))
def test_what_is_read_is_what_was_decided(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("reviews") / "r.jsonl"
    reviews, expected = ReviewFile(path), {}
    for number, step in steps:
        key = Reviewed("ü", "T", f"text\n{number}", "out")
        if step == "undo":
            reviews.undo(key)
            expected.pop(key, None)
        else:
            reviews.decide(key, step)
            expected[key] = step
    assert dict(ReviewFile(path).items()) == dict(reviews.items()) == expected
