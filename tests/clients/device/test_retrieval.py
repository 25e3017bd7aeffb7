"""BM25 by hand, against a plain-Python oracle, and what may never be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.clients.device.retrieval import Retriever, retrieve, words
from untether.sim.core.records import Interaction, Query


def history(*texts: str) -> list[Interaction]:
    return [Interaction(str(n), "T", text, "") for n, text in enumerate(texts)]


def ids(items) -> list[str]:
    return [item.item_id for item in items]


def bm25(documents: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's variant as Kamphuis et al. (2020) write it."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            having = sum(word in other for other in documents)
            tf = document.count(word)
            if tf:
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_scores_by_hand():
    """Two documents of three words, "dog" in one: idf = ln 2, tf part = 1 / (1 + 1.5)."""
    retriever = Retriever(history("the dog barks", "the cat sleeps"))
    np.testing.assert_allclose(retriever._scores(["dog"], 2), [math.log(2) / 2.5, 0.0], rtol=1e-6)


def test_best_first_and_ties_in_the_historys_order():
    items = history("stocks fell", "a dog ran", "stocks and bonds fell on monday", "a dog sat", "a dog ran")
    assert ids(retrieve(items, "dog ran", 3)) == ["1", "4", "3"]
    assert ids(retrieve(items, "nothing matches", 5)) == ["0", "1", "2", "3", "4"]
    assert ids(retrieve(items, "bonds", 99)) == ["2", "0", "1", "3", "4"]


def test_the_output_is_searched_too_and_stop_words_count():
    items = [Interaction("a", "T", "x", "markets drop"), Interaction("b", "T", "x", "to be or not to be")]
    assert ids(retrieve(items, "why markets drop", 1)) == ["a"]
    assert ids(retrieve(items, "To BE!", 1)) == ["b"]
    assert words("I'm a Straße, 2 €") == ["i", "m", "a", "strasse", "2"]


@pytest.mark.parametrize("query", ["", "!?", "dog", "zebra"])
def test_small_histories_and_empty_texts(query):
    assert retrieve([], query, 3) == []
    assert ids(retrieve(history("dog"), query, 3)) == ["0"]
    assert ids(retrieve(history("", "!?"), query, 3)) == ["0", "1"]
    assert retrieve(history("dog"), query, 0) == []


def test_a_query_sees_only_what_precedes_it():
    items = history("dog one", "cat", "dog dog dog", "dog")
    retriever = Retriever(items)
    assert ids(retriever.retrieve(Query("q", "T", "dog", "", visible=2), 4)) == ["0", "1"]
    assert ids(retriever.retrieve("dog", 4, visible=0)) == []
    assert ids(retriever.retrieve(Query("q", "T", "dog", ""), 1)) == ["2"]
    assert ids(retrieve(items[:2], Query("q", "T", "dog", "", visible=1), 2)) == ["0", "1"]


documents = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=8).map(" ".join), min_size=1, max_size=9)
queries = st.lists(st.sampled_from("abcdefgh"), max_size=6).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(documents, queries)
def test_equals_the_oracle(texts, query):
    scores = Retriever(history(*texts))._scores(words(query), len(texts))
    expected = bm25([words(text) for text in texts], words(query)) if any(texts) else np.zeros(len(texts))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(documents, documents, queries)
def test_later_items_change_nothing(before, after, query):
    """Not the order and not the weights: the index of the visible part is all that counts."""
    whole = Retriever(history(*before, *after))
    assert whole.retrieve(query, 5, visible=len(before)) == retrieve(history(*before), query, 5)


def test_many_queries_with_their_own_horizons_share_a_retriever():
    items = history(*(f"word{n} common" for n in range(30)))
    retriever = Retriever(items)
    for visible in [*range(1, 31), *range(30, 0, -1)]:
        assert ids(retriever.retrieve(f"word{visible - 1}", 1, visible)) == [str(visible - 1)]


def test_silent(capfd):
    retrieve(history("a dog", "a cat"), "dog", 1)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
