"""The scores are LaMP's own: against hand-worked numbers and against scikit-learn."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.core.errors import UserError
from untether.sim.evaluation.metrics import corpus_score, f1_counts, macro_f1, rating_error, score
from untether.sim.population.tasks import NEWS_CATEGORIES, get_task, task_names

LABELS = st.sampled_from(NEWS_CATEGORIES)


def test_accuracy_is_exact_after_stripping():
    assert score("LaMP_2N", " sports\n", "sports") == {"accuracy": 1.0}
    assert score("LaMP_2N", "Sports", "sports") == {"accuracy": 0.0}
    assert score("LaMP_1", "[2]", "[1]") == {"accuracy": 0.0}
    assert score("LaMP_2", None, "comedy") == {"accuracy": 0.0}


def test_macro_f1_by_hand():
    """Two labels of LaMP-1; [1]: TP 1, FP 1, FN 1 -> 2/4; [2]: TP 1, FP 0, FN 2 (one to a non-label) -> 2/4."""
    predictions = ["[1]", "[1]", "[2]", "neither", "I think [1]"]
    golds = ["[1]", "[2]", "[2]", "[2]", "[1]"]
    assert corpus_score("LaMP_1", predictions, golds) == {"accuracy": 2 / 5, "macro_f1": 0.5}


def test_macro_f1_is_over_the_labels_that_are_somebodys_right_answer():
    assert corpus_score("LaMP_2N", ["sports"], ["sports"]) == {"accuracy": 1.0, "macro_f1": 1.0}
    # sports: TP 1, FN 1 -> 2/3. crime is nobody's right answer: that it is said is wrong, and no third label.
    assert corpus_score("LaMP_2N", ["sports", "crime"], ["sports", "sports"])["macro_f1"] == pytest.approx(2 / 3)
    assert macro_f1(np.zeros((2, 3))) == 0.0


@given(st.lists(LABELS, min_size=1, max_size=30))
def test_whoever_is_always_right_has_a_macro_f1_of_one(golds):
    assert corpus_score("LaMP_2N", golds, golds)["macro_f1"] == 1.0


@given(st.lists(st.tuples(LABELS | st.just("no label"), LABELS), min_size=1, max_size=30))
def test_macro_f1_is_lamps_divided_by_the_share_of_labels_that_occur(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, golds = zip(*pairs, strict=True)
    index = {label: place for place, label in enumerate(NEWS_CATEGORIES)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sklearn.f1_score(
            [index[gold] for gold in golds],
            [index.get(prediction, -1) for prediction in predictions],
            labels=list(range(15)),
            average="macro",
        )
    own = corpus_score("LaMP_2N", predictions, golds)["macro_f1"]
    assert own * len(set(golds)) / 15 == pytest.approx(expected, abs=1e-12)


def test_counts_of_several_sets_are_scored_at_once():
    right, wrong = f1_counts("LaMP_1", "[1]", "[1]"), f1_counts("LaMP_1", "[1]", "[2]")
    assert macro_f1(np.stack([right, wrong, right + wrong])) == pytest.approx([1.0, 0.0, 1 / 3])


@pytest.mark.parametrize(
    ("prediction", "gold", "error"),
    [
        ("4", "5", -1.0),
        ("4.5", "5", -0.5),
        ("17", "5", 12.0),
        ("", "5", -4.0),
        ("great", "2", 3.0),
        ("great", "3", 2.0),
        ("5 stars", "4", -3.0),
        ("nan", "1", 4.0),
        ("inf", "4", -3.0),
        (None, "5", -4.0),
    ],
)
def test_a_rating_that_does_not_parse_is_as_wrong_as_it_could_be(prediction, gold, error):
    assert rating_error(prediction, gold) == error
    assert score("LaMP_3", prediction, gold) == {"mae": abs(error)}


def test_mae_and_rmse_by_hand():
    """Errors -1, 0, -4 (no answer to a 5): MAE 5/3, RMSE sqrt(17/3)."""
    assert corpus_score("LaMP_3", ["4", "3", ""], ["5", "3", "5"]) == {
        "mae": pytest.approx(5 / 3),
        "rmse": pytest.approx(math.sqrt(17 / 3)),
    }


def test_rouge_by_hand():
    """Gold of 4 words, answer of 3, of which 2 are shared and in order, though not next to each other:
    precision 2/3, recall 2/4 -> F 4/7. Turned round, ROUGE-L keeps one word: 1/3, 1/4 -> 2/7.
    """
    assert score("LaMP_4", "Council shuts bridge", "The council closes bridge") == {
        "rouge1": pytest.approx(4 / 7),
        "rougeL": pytest.approx(4 / 7),
    }
    assert score("LaMP_5", "bridge shuts council", "The council closes bridge") == {
        "rouge1": pytest.approx(4 / 7),
        "rougeL": pytest.approx(2 / 7),
    }


def test_rouge_does_not_stem_and_scores_silence_with_zero():
    assert score("LaMP_7", "bridges", "bridge") == {"rouge1": 0.0, "rougeL": 0.0}
    assert score("LaMP_7", "", "bridge") == score("LaMP_7", None, "!!") == {"rouge1": 0.0, "rougeL": 0.0}


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=5))
def test_generation_scores_are_fractions_and_a_set_scores_its_mean(pairs):
    predictions, golds = zip(*pairs, strict=True)
    single = [score("LaMP_4", prediction, gold) for prediction, gold in pairs]
    assert all(0 <= value <= 1 for values in single for value in values.values())
    for metric, value in corpus_score("LaMP_4", predictions, golds).items():
        assert value == pytest.approx(sum(values[metric] for values in single) / len(single))


@pytest.mark.parametrize("task", task_names())
def test_every_task_reports_the_metrics_it_names(task):
    gold = "5" if task == "LaMP_3" else "words"
    assert set(corpus_score(task, ["x"], [gold])) == set(get_task(task).metrics)
    assert get_task(task).primary in score(task, "x", gold)


def test_unknown_task_and_empty_set():
    with pytest.raises(UserError, match="unknown task"):
        score("LaMP_0", "a", "b")
    with pytest.raises(ValueError, match="no answers"):
        corpus_score("LaMP_4", [], [])
