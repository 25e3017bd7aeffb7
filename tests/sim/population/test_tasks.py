"""The tasks ask in LaMP's words: what is put around a content comes off again, and history becomes training pairs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from untether.plugins import register
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.population.dates import parse_date
from untether.sim.population.tasks import get_task, rag_prompt, task_names

CITATION = (
    'For an author who has written the paper with the title "On A", which reference is related? Just answer with [1] '
    'or [2] without explanation. [1]: "On B" [2]: "On C"'
)
NEWS = (
    "Which category does this article relate to among the following categories? Just answer with the category name "
    "without further explanation. categories: [women, religion, politics, style & beauty, entertainment, culture & "
    "arts, sports, science & technology, travel, business, crime, education, healthy living, parents, food & drink] "
    "article: A cup was won."
)
MOVIE = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    "explanation. tags: [sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
    "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story] description: A robot."
)
OFFICIAL = [
    ("LaMP_1", CITATION, '"On A" [1]: "On B" [2]: "On C"'),
    ("LaMP_2", MOVIE, "A robot."),
    ("LaMP_2N", NEWS, "A cup was won."),
    (
        "LaMP_3",
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: Fine.",
        "Fine.",
    ),
    ("LaMP_4", "Generate a headline for the following article: It rained.", "It rained."),
    ("LaMP_5", "Generate a title for the following abstract of a paper: We prove it.", "We prove it."),
    ("LaMP_7", "Paraphrase the following tweet without any explanation before or after it: Hi there.", "Hi there."),
]


@pytest.mark.parametrize(("name", "question", "content"), OFFICIAL)
def test_the_official_instruction_comes_off_and_goes_on_again(name, question, content):
    task = get_task(name)
    assert task.content(question) == content
    assert task.prompt(content) == question
    assert task.prompt(question) == question


@given(st.text(), st.sampled_from([name for name in task_names() if name != "LaMP_1"]))
def test_any_content_survives_its_prompt(content, name):
    task = get_task(name)
    if task.content(content) == content:
        assert task.content(task.prompt(content)) == content


@example(" [1]: ", "", "")
@given(st.text(alphabet='ab "[]12:,'), st.text(alphabet='ab "[]12:,'), st.text(alphabet='ab "[]12:,'))
def test_citation_questions_survive_whatever_the_titles_hold(title, first, second):
    task = get_task("LaMP_1")
    question = CITATION.replace("On A", title).replace("On B", first).replace("On C", second)
    assert task.prompt(task.content(question)) == question


def test_text_in_another_wording_is_content():
    task = get_task("LaMP_4")
    assert task.content("Write a headline: it rained.") == "Write a headline: it rained."
    assert task.prompt("It rained.") == "Generate a headline for the following article: It rained."


def test_a_label_list_in_another_order_is_stripped_and_written_back_in_order():
    task = get_task("LaMP_2N")
    other = NEWS.replace("women, religion", "religion, women")
    assert task.content(other) == "A cup was won."
    assert task.prompt(task.content(other)) == NEWS


def test_names_may_be_spelled_with_a_dash_and_unknown_ones_list_the_known():
    assert get_task("LaMP-2N") is get_task("LaMP_2N")
    with pytest.raises(UserError, match=r"LaMP_6.*LaMP_1, LaMP_2, LaMP_2N, LaMP_3, LaMP_4, LaMP_5, LaMP_7"):
        get_task("LaMP_6")
    with pytest.raises(ValueError, match="registered already"):
        register("task", "LaMP_4", get_task("LaMP_4"))


def test_profiles_become_training_pairs():
    made = {
        "LaMP_1": {"title": "T", "abstract": "A"},
        "LaMP_2": {"description": "D", "tag": "comedy"},
        "LaMP_2N": {"title": "T", "text": "X", "category": "sports"},
        "LaMP_3": {"text": "Good", "score": 5.0},
        "LaMP_4": {"title": "T", "text": "X"},
        "LaMP_5": {"title": "T", "abstract": "A"},
        "LaMP_7": {"text": "one two three  four five six seven"},
    }
    got = {
        name: [(i.input, i.output, i.form) for i in get_task(name).interactions({"id": "7"} | item)]
        for name, item in made.items()
    }
    assert got == {
        "LaMP_1": [("A", "T", "title")],
        "LaMP_2": [("D", "comedy", "query")],
        "LaMP_2N": [("X", "sports", "query")],
        "LaMP_3": [("Good", "5", "query")],
        "LaMP_4": [("X", "T", "query")],
        "LaMP_5": [("A", "T", "query")],
        "LaMP_7": [("one two", "three four five six seven", "complete")],
    }
    for name, pairs in got.items():
        assert pairs[0][2] in get_task(name).forms


def test_items_without_text_make_no_pair_and_missing_fields_are_errors():
    assert get_task("LaMP_4").interactions({"title": " ", "text": "X"}) == ()
    assert get_task("LaMP_7").interactions({"text": "too short"}) == ()
    with pytest.raises(KeyError, match="abstract"):
        get_task("LaMP_5").interactions({"title": "T"})
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        get_task("LaMP_4").interactions({"title": "T", "text": "X", "date": "last week"})


def test_dates():
    assert parse_date("1970") == parse_date(1970) == parse_date("1970-01") == parse_date("1970-01-01") == 0.0
    assert parse_date("1970-01-02") == 86_400.0
    assert parse_date("1970-01-01T00:01:00Z") == parse_date("1970-01-01 02:01:00+02:00") == 60.0
    assert parse_date(1_500_000_000) == 1.5e9
    assert parse_date(None) is None
    for wrong in ("2020-13-01", True, float("nan"), "1/2/2020", [1]):
        with pytest.raises(ValueError, match="is no date"):
            parse_date(wrong)


def test_retrieved_history_is_worded_as_in_the_paper():
    def item(name, source, target, form="query"):
        return Interaction("0", name, source, target, None, form)

    two = [item("LaMP_4", "rain fell", "Rain"), item("LaMP_4", "sun {x}", "Sun")]
    task = get_task("LaMP_4")
    assert rag_prompt(task, two, "Snow fell.") == (
        '"Rain" is the title for "rain fell", and "Sun" is the title for "sun {x}". '
        "Generate a headline for the following article: Snow fell."
    )
    assert rag_prompt(task, two[:1], "Snow fell.", max_words=1).startswith('"Rain" is the title for "rain". Generate')
    assert rag_prompt(task, [], "Snow fell.") == task.prompt("Snow fell.")
    citation = get_task("LaMP_1")
    asked = rag_prompt(citation, [item("LaMP_1", "We.", "On D", "title")], citation.content(CITATION))
    assert asked == CITATION.replace('"On A"', '"On A", and "On D"')
    tweet = rag_prompt(get_task("LaMP_7"), [item("LaMP_7", "a b", "c", "complete")], "Hi.")
    assert tweet.startswith('"a b c" are written by a person. Following the given patterns Paraphrase')


@pytest.mark.skipif("UNTETHER_REAL_DATA" not in os.environ, reason="UNTETHER_REAL_DATA is not set")
@pytest.mark.parametrize("name", ["LaMP_2N", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"])
def test_real_questions_round_trip(name):
    path = Path(os.environ["UNTETHER_REAL_DATA"]) / "lamp" / name / "dev_questions.json"
    task = get_task(name)
    for question in json.loads(path.read_text()):
        assert task.prompt(task.content(question["input"])) == question["input"] != task.content(question["input"])
