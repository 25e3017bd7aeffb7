"""What counts as a leak of a held-out question, and what must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.core.records import Interaction, Query
from untether.sim.population.leaks import COPIED_WORDS, LeakChecker, normalize, unscored

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


words = st.sampled_from(["bridge", "Old", "council", "the", "rain", "closes"])
texts = st.lists(words, max_size=9).map(" ".join)
golds = st.lists(words, min_size=3, max_size=5)


@given(golds, texts, texts, texts, st.sampled_from([" ", ", ", " -- ", "\n"]))
def test_a_gold_is_a_leak_wherever_it_stands_in_a_sample(gold, before, after, other, between):
    """However it is punctuated: in the input, in the output, or begun in the one and ended in the other."""
    checker = LeakChecker([Query("q", "LaMP_4", ARTICLE, " ".join(gold))])
    holding = f"{before} {between.join(gold).upper()}! {after}"
    assert checker.is_leak("LaMP_4", holding, other)
    assert checker.is_leak("LaMP_4", other, holding)
    assert checker.is_leak("LaMP_4", f"{before} {gold[0]}", f"{' '.join(gold[1:])} {after}")


@given(golds, texts, texts)
def test_a_gold_is_a_leak_only_as_whole_words_in_a_row(gold, source, target):
    checker = LeakChecker([Query("q", "LaMP_4", ARTICLE, " ".join(gold))])
    wanted, told = normalize(" ".join(gold)), normalize(f"{source} {target}")
    assert checker.is_leak("LaMP_4", source, target) == (f" {wanted} " in f" {told} ")
    assert not checker.is_leak("LaMP_4", source.replace(" ", "x"), "")


@given(st.lists(words, min_size=1, max_size=2), texts, texts)
def test_a_trivial_gold_and_a_label_are_anybodys(gold, source, target):
    assert not LeakChecker([Query("q", "LaMP_4", ARTICLE, " ".join(gold))]).is_leak("LaMP_4", source, target)
    labelled = LeakChecker([Query("q", "LaMP_2N", ARTICLE, "science & technology now")])
    assert not labelled.is_leak("LaMP_2N", f"{source} science & technology now", target)


def item(source: str, target: str, task: str = "LaMP_4") -> Interaction:
    return Interaction("i", task, source, target)


def test_another_persons_item_shares_set_phrases_but_is_no_copy():
    words_in_row = [f"w{n}" for n in range(60)]
    asked = [Query("q", "LaMP_4", " ".join(words_in_row), "Council Closes Old Bridge")]
    phrase = item(" ".join(["so", *words_in_row[: COPIED_WORDS - 1], "it", "is"]), "A title")
    copied = item(" ".join(["so", *words_in_row[:COPIED_WORDS], "it", "is"]), "A title")
    gold, quoted = item("x", "Council closes old bridge!"), item("They say: council closes old bridge.", "A title")
    other = item("x", "Council closes old bridge!", "LaMP_5")
    assert unscored([phrase, copied, gold, quoted, other], asked) == [phrase, other]


@given(st.lists(st.tuples(texts, texts), max_size=6), st.lists(st.tuples(texts, golds), max_size=6), st.integers(1, 3))
def test_however_many_queries_are_held_at_a_time(pairs, asked, held):
    items = [item(source, target) for source, target in pairs]
    queries = [Query("q", "LaMP_4", source, " ".join(gold)) for source, gold in asked]
    checker = LeakChecker(queries, COPIED_WORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("untether.sim.population.leaks._QUERIES_HELD", held)
        left = unscored(items, iter(queries))
    assert left == [one for one in items if not checker.is_leak("LaMP_4", one.input, one.output)]


@given(st.text(), st.text())
def test_a_querys_own_input_is_always_a_leak(text, answer):
    assert LeakChecker([Query("q", "LaMP_4", text, "gold")]).is_leak("LaMP_4", text, answer)


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LeakChecker([], ngram_words=0)
