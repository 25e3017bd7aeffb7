"""LaMP files as people have them: read rightly, or refused with the file, the place and the rule."""

from __future__ import annotations

import json

import pytest

from untether.sim.core import strict_json
from untether.sim.core.errors import UserError
from untether.sim.evaluation.metrics import mostly_unseen, score, unicode_rouge
from untether.sim.population.dates import parse_date
from untether.sim.population.lamp import read_lamp
from untether.sim.population.tasks import get_task

LABELS = ("comedy", "action", "classic")


def write(folder, task="LaMP_4", change=None, raw=None):
    """Three users with five history items and one question each."""
    folder = folder / task
    folder.mkdir(parents=True)
    fields = {"LaMP_4": ("text", "title"), "LaMP_2": ("description", "tag"), "LaMP_3": ("text", "score")}[task]
    output = {"LaMP_4": "Mayor argues {}", "LaMP_2": LABELS[0], "LaMP_3": "4"}[task]
    ask = get_task(task).instructions["query"].split("{content}")[0]
    questions = [
        {"id": f"{user}", "input": f"{ask}Yesterday, {user}, a debate.", "profile": [
            {"id": f"{user}{k}", fields[0]: f"The council spoke, {k}.", fields[1]: output.format(k)} for k in range(5)
        ]} for user in range(3)
    ]  # fmt: skip
    golds = [{"id": f"{user}", "output": output.format(user)} for user in range(3)]
    if change:
        change(questions, golds)
    text = json.dumps(questions)
    (folder / "dev_questions.json").write_text(raw(text) if raw else text, encoding="utf-8")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return folder.parent


@pytest.mark.parametrize("gold", [None, "", "   "])
def test_a_question_without_a_gold_is_left_out_and_counted(tmp_path, gold):
    users, excluded = read_lamp(write(tmp_path, change=lambda questions, golds: golds[0].update(output=gold)))
    assert len(users) == 2
    assert [one.what for one in excluded if one.reason == "question without gold"] == ["LaMP_4 0"]


@pytest.mark.parametrize("gold", [["a", "b"], {"a": 1}, True])
def test_a_gold_that_is_no_text_is_refused(tmp_path, gold):
    with pytest.raises(UserError, match=r"dev_outputs.json: gold '1': output is a"):
        read_lamp(write(tmp_path, change=lambda questions, golds: golds[1].update(output=gold)))


def test_a_gold_that_is_a_number_is_its_digits(tmp_path):
    users, _ = read_lamp(write(tmp_path, "LaMP_3", lambda questions, golds: golds[0].update(output=4.0)))
    assert sorted(query.gold for user in users for query in user.queries) == ["4", "4", "4"]


def test_labels_in_another_case_are_the_tasks_labels(tmp_path):
    def shout(questions, golds):
        golds[0]["output"] = "Comedy"
        questions[0]["profile"][0]["tag"] = "COMEDY "

    users, _ = read_lamp(write(tmp_path, "LaMP_2", shout))
    assert {query.gold for user in users for query in user.queries} == {"comedy"}
    assert {item.output for user in users for item in user.history} == {"comedy"}


@pytest.mark.parametrize(("task", "gold", "said"), [
    ("LaMP_2", "telenovela", "the gold 'telenovela' of question '0' is no label of LaMP_2"),
    ("LaMP_3", "3.5", "the gold '3.5' of question '0' is no label of LaMP_3"), ("LaMP_4", None, "has no gold"),
])  # fmt: skip
def test_the_message_blames_the_golds_where_they_are_at_fault(tmp_path, task, gold, said):
    with pytest.raises(UserError, match=said) as caught:
        read_lamp(write(tmp_path, task, lambda questions, golds: [one.update(output=gold) for one in golds]))
    assert "dev_outputs.json" in str(caught.value) and "min_history" not in str(caught.value)


@pytest.mark.parametrize(("word", "said"), [
    ("NaN", "line 1: NaN is no JSON value"), ("Infinity", "Infinity is no JSON value"),
])  # fmt: skip
def test_what_python_writes_and_json_does_not_have_is_named(tmp_path, word, said):
    with pytest.raises(UserError, match=f"dev_questions.json.*{said}"):
        read_lamp(write(tmp_path, raw=lambda text: text.replace('"Mayor argues 0"', word, 1)))


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert len(read_lamp(write(tmp_path, raw=lambda text: "\ufeff" + text))[0]) == 3


@pytest.mark.parametrize("value", [["a"], {"a": 1}, True])
def test_a_field_that_is_no_text_is_refused(tmp_path, value):
    def change(questions, golds):
        questions[1]["profile"][2]["title"] = value

    with pytest.raises(UserError, match="question '1', profile item 3: title is a"):
        read_lamp(write(tmp_path, change=change))


@pytest.mark.parametrize(("value", "said"), [
    (1_450_000_000_000_000_000, "nanoseconds: divide by 1000000000"), (1_450_000_000_000, "milliseconds"),
    (1e30, "no number of seconds"), ("yesterday", "is no date"), (float("nan"), "is no date"), (True, "is no date"),
])  # fmt: skip
def test_a_date_that_is_none(value, said):
    with pytest.raises(ValueError, match=said):
        parse_date(value)


def test_dates_that_are():
    assert parse_date(1_450_000_000) == 1_450_000_000.0 and parse_date(2015) == parse_date("2015") == 1420070400.0
    assert parse_date(None) is None is parse_date("")


# --- bounded JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "said"), [
    ("[" * 500 + "]" * 500, "nested deeper"), ("[" * 100_000, "nested deeper"), ("9" * 5000, "5000 digits"),
    ("1e999", "larger than can be told"), ("[1,\n NaN]", "line 2: NaN"), ("{", "line 1"), (b"\xff", "utf-8"),
    ("", "line 1"),
])  # fmt: skip
def test_json_beyond_bounds_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        strict_json.loads(text)


def test_json_within_bounds_is_what_it_says():
    value = {"a": [1, 2.5, -3, 12345678901234567890, None, True, "x"], "b": {"c": [[[]]]}}
    assert strict_json.loads(json.dumps(value)) == value == strict_json.loads("\ufeff" + json.dumps(value))


# --- scripts that ROUGE does not read ---------------------------------------------------------------------------


def test_a_perfect_answer_in_another_script_scores_beside_the_official_rouge():
    gold = "Мэр спорит о причалах"
    assert mostly_unseen(gold) and not mostly_unseen("Mayor argues, café") and not mostly_unseen("?!")
    assert score("LaMP_4", gold, gold) == {"rouge1": 0.0, "rougeL": 0.0}
    assert unicode_rouge(gold, gold) == (1.0, 1.0)
    assert unicode_rouge("市長は港", "市長は駅") == (0.75, 0.75)
    assert unicode_rouge("Mayor argues", "Mayor argues again") == pytest.approx((0.8, 0.8))
