"""LaMP's official metrics, one answer at a time and over a set of answers.

They follow the benchmark's public evaluation script (github.com/LaMP-Benchmark/LaMP, `eval/evaluation.py`):

- both sides are stripped, nothing else is cleaned: "Sports" is not "sports";
- accuracy, and macro-F1 over the task's labels, where a prediction that is no label is wrong. The script divides by the
  full label list, so a label that is nobody's right answer counts 0 and even a perfect classifier stays below 1. Here
  the labels averaged over are those that occur among the golds, whatever is predicted: the same ones for every arm. The
  script's value is this one times the share of the label list that occurs; the two are equal where all of it does;
- MAE and RMSE, where a prediction that is no number counts as whichever of 1 and 5 is further from the gold;
- F-measure of ROUGE-1 and ROUGE-L from `rouge-score`, without stemming (the default of the script's `evaluate`).
  The script reports the median of a random bootstrap of the mean; here it is the mean itself.

An answer that is missing (None) is scored as the empty text. Values are fractions, 0 to 1, except MAE and RMSE, in
stars.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from untether.sim.core.kinds import METRICS
from untether.sim.population.tasks import get_task, higher_is_better, of_answers

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

__all__ = ["corpus_score", "f1_counts", "higher_is_better", "macro_f1", "rating_error", "score"]


def score(task: str, prediction: str | None, gold: str) -> dict[str, float]:
    """Returns the query-level metrics of one answer: `accuracy`, `mae`, `rouge1` and `rougeL`, or a plug-in's own.

    Macro-F1 and RMSE belong to a set of answers: see `corpus_score`.

    Raises:
        UserError: The task or a metric is unknown.
    """
    prediction, gold = (prediction or "").strip(), gold.strip()
    return {metric: METRICS.get(metric)(prediction, gold) for metric in of_answers(get_task(task).metrics)}


def accuracy(prediction: str, gold: str) -> float:
    """Returns 1 for the exact text of the gold, else 0."""
    return float(prediction == gold)


def mae(prediction: str, gold: str) -> float:
    """Returns the absolute error in stars (see `rating_error`)."""
    return abs(rating_error(prediction, gold))


def rouge1(prediction: str, gold: str) -> float:
    """Returns the F-measure of single words."""
    return _rouge(prediction, gold)[0]


def rougeL(prediction: str, gold: str) -> float:
    """Returns the F-measure of the longest common subsequence."""
    return _rouge(prediction, gold)[1]


def corpus_score(task: str, predictions: Sequence[str | None], golds: Sequence[str]) -> dict[str, float]:
    """Returns every metric of a task over a set of answers, all with the same weight.

    Raises:
        ValueError: The set is empty.
    """
    if not golds:
        raise ValueError("no answers to score")
    pairs = list(zip(predictions, golds, strict=True))
    single = [score(task, prediction, gold) for prediction, gold in pairs]
    means = {metric: float(np.mean([values[metric] for values in single])) for metric in single[0]}
    for metric in get_task(task).metrics:
        if metric == "macro_f1":
            means[metric] = float(macro_f1(sum(f1_counts(task, prediction, gold) for prediction, gold in pairs)))
        elif metric == "rmse":
            means[metric] = math.sqrt(np.mean([values["mae"] ** 2 for values in single]))
    return means


def rating_error(prediction: str | None, gold: str) -> float:
    """Returns prediction minus gold, in stars; the worst case of 1 and 5 where the prediction is no finite number.

    A number outside 1 to 5 counts as it is.

    Raises:
        ValueError: The gold is no number.
    """
    true = float(gold)
    try:
        value = float(prediction or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        value = 1.0 if abs(1 - true) > abs(5 - true) else 5.0
    return value - true


def f1_counts(task: str, prediction: str | None, gold: str) -> np.ndarray:
    """Returns one answer's part of macro-F1: int array [labels, 3] of true positives, false positives, false negatives.
    """
    labels = get_task(task).labels or ()
    prediction, gold = (prediction or "").strip(), gold.strip()
    counts = np.zeros((len(labels), 3), dtype=np.int64)
    if prediction == gold and gold in labels:
        counts[labels.index(gold), 0] = 1
        return counts
    if prediction in labels:
        counts[labels.index(prediction), 1] = 1
    if gold in labels:
        counts[labels.index(gold), 2] = 1
    return counts


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Returns macro-F1 of summed counts [..., labels, 3]: the mean of 2 TP / (2 TP + FP + FN) over labels with a gold.

    It is 0 where no label has one.
    """
    hits = 2.0 * counts[..., 0]
    occurs = counts[..., 0] + counts[..., 2] > 0
    values = np.divide(hits, hits + counts[..., 1] + counts[..., 2], out=np.zeros_like(hits), where=occurs)
    return values.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


@lru_cache(maxsize=65_536)
def _rouge(prediction: str, gold: str) -> tuple[float, float]:
    scores = _scorer().score(target=gold, prediction=prediction)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure


def mostly_unseen(text: str) -> bool:
    """Returns whether most of a text's letters and digits are none that the official ROUGE reads: it knows ASCII alone.
    """
    own = [character for character in text if character.isalnum()]
    return sum(character.isascii() for character in own) * 2 < len(own)


def unicode_rouge(prediction: str, gold: str) -> tuple[float, float]:
    """F-measures of ROUGE-1 and ROUGE-L over the words of any script, beside the official ones."""
    scores = _unicode_scorer().score(target=gold, prediction=prediction)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure


class _Words:
    """Words of any script, lower-case; those of scripts without spaces letter by letter."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+")


@lru_cache(maxsize=1)
def _unicode_scorer() -> RougeScorer:
    return _scorer_class()(["rouge1", "rougeL"], tokenizer=_Words())


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    return _scorer_class()(["rouge1", "rougeL"], use_stemmer=False)


def _scorer_class() -> type[RougeScorer]:
    """Imported at the first score: rouge-score imports all of nltk, which imports scikit-learn, for seconds."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer
