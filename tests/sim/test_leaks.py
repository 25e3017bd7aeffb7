"""What counts as a leak of a held-out question, and what must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.leaks import LeakChecker, normalize
from sim.records import Query

ARTICLE = "The council voted on Tuesday to close the old bridge, citing the cost of repairs."
HEADLINES = LeakChecker([Query("q", "LaMP_4", ARTICLE, "Council Closes Old Bridge")])


def test_an_input_that_differs_in_case_and_punctuation_only_is_the_same():
    assert HEADLINES.is_leak(
        "LaMP_4", "the council VOTED on tuesday to close the old bridge -- citing the cost of repairs", "x"
    )


def test_eight_words_in_a_row_are_a_quotation_and_seven_are_not():
    assert HEADLINES.is_leak("LaMP_4", "Yesterday voted on Tuesday to close the old bridge indeed.", "x")
    assert not HEADLINES.is_leak("LaMP_4", "Yesterday voted on Tuesday to close the old pier indeed.", "x")
    strict = LeakChecker([Query("q", "LaMP_4", ARTICLE, "x")], ngram_words=7)
    assert strict.is_leak("LaMP_4", "Yesterday voted on Tuesday to close the old pier indeed.", "x")


def test_a_gold_is_a_leak_in_free_text_tasks_unless_it_is_trivial():
    assert HEADLINES.is_leak("LaMP_4", "Something else.", "council closes old bridge!")
    assert not HEADLINES.is_leak("LaMP_4", "Something else.", "Council Opens Old Bridge")
    assert not LeakChecker([Query("q", "LaMP_7", "I am grateful.", "thanks all")]).is_leak("LaMP_7", "Hi", "Thanks all")


def test_a_tweet_cut_in_two_is_put_together_against_the_golds():
    checker = LeakChecker([Query("q", "LaMP_7", "I am bored at present.", "so bored right now lol")])
    assert checker.is_leak("LaMP_7", "so bored", "right now lol")
    assert not checker.is_leak("LaMP_7", "so bored", "right now")


@pytest.mark.parametrize(("task", "label"), [("LaMP_2N", "science & technology"), ("LaMP_3", "5"), ("LaMP_1", "[1]")])
def test_labels_never_count(task, label):
    checker = LeakChecker([Query("q", task, "some words to be judged", label)])
    assert not checker.is_leak(task, "other words", label)
    assert checker.is_leak(task, "Some words to be judged.", "another label")


def test_a_query_of_another_task_is_no_matter():
    assert not HEADLINES.is_leak("LaMP_5", ARTICLE, "Council Closes Old Bridge")


def test_a_citation_querys_own_title_counts():
    checker = LeakChecker([Query("q", "LaMP_1", '"On bridges" [1]: "A" [2]: "B"', "[2]")])
    assert checker.is_leak("LaMP_1", "On Bridges", "anything")
    assert not checker.is_leak("LaMP_1", "On piers", "[2]")


def test_text_without_words_equals_itself_only():
    assert normalize(" !! ") == "!!" != normalize("??")
    assert normalize("Ａ_b  C!") == "a b c"


@given(st.text(), st.text())
def test_a_querys_own_input_is_always_a_leak(text, answer):
    assert LeakChecker([Query("q", "LaMP_4", text, "gold")]).is_leak("LaMP_4", text, answer)


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LeakChecker([], ngram_words=0)
