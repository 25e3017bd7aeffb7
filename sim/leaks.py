"""Whether a synthetic sample gives away a held-out question: the check that every synthetic arm passes through.

The cloud never sees the held-out queries, but it may have been trained on them (public data), or may quote a history
item that overlaps one. The evaluator, which knows the queries, drops such samples and counts them; a deployed device
has no such check.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from sim.population.tasks import get_task
from sim.records import Query

_NOT_WORD = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """Case, accents' encoding, punctuation and spacing removed: words joined by one space.

    A text without any letter or digit (an emoji, "!!") is kept, without spaces at its ends, so that it equals itself
    only.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _NOT_WORD.sub(" ", folded).strip() or folded.strip()


def scored_texts(query: Query) -> tuple[str, ...]:
    """The normalized texts that score a query and so must be in no training pair: its input and, where the task asks
    for free text, its gold. Labels and ratings never count. LaMP-1: also the query's own title.
    """
    texts = [query.input]
    if get_task(query.task).kind == "generation":
        texts.append(query.gold)
    title, found, _ = query.input.partition(' [1]: "')
    if query.task == "LaMP_1" and found:
        texts.append(title)
    return tuple(normalize(text) for text in texts if text.strip())


class LeakChecker:
    """Judges samples against a set of held-out queries, task by task.

    A sample is a leak if

    - its normalized input equals a query's input (or, in LaMP-1, the query's title), or shares `ngram_words` words in a
      row with a query's input (default 8: long enough that two texts on one topic rarely share it, short enough to
      catch a quoted clause);
    - for free-text tasks, its normalized output equals a gold of at least `gold_words` words (default 3: a shorter
      gold, "Thanks", is anybody's).

    Class labels and ratings never count. The input of an auxiliary pair (a tweet's first words) is read together with
    its output against the golds, too, so that a quoted tweet is caught however it is cut.
    """

    def __init__(self, queries: Iterable[Query], ngram_words: int = 8, gold_words: int = 3) -> None:
        if ngram_words < 1 or gold_words < 1:
            raise ValueError(f"ngram_words = {ngram_words}, gold_words = {gold_words}: both must be at least 1")
        self._ngram_words = ngram_words
        self._inputs: dict[str, set[str]] = defaultdict(set)
        self._grams: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        self._golds: dict[str, set[str]] = defaultdict(set)
        for query in queries:
            texts = scored_texts(query)
            self._inputs[query.task].add(normalize(query.input))
            self._grams[query.task].update(self._ngrams(normalize(query.input)))
            if get_task(query.task).kind == "generation":
                if len((gold := normalize(query.gold)).split()) >= gold_words:
                    self._golds[query.task].add(gold)
            else:
                self._inputs[query.task].update(texts)

    def is_leak(self, task: str, sample_input: str, sample_output: str) -> bool:
        """Whether the sample (contents alone, without the task's instruction) gives away a held-out query of a task."""
        source, target = normalize(sample_input), normalize(sample_output)
        if source in self._inputs[task] or not self._grams[task].isdisjoint(self._ngrams(source)):
            return True
        golds = self._golds[task]
        return target in golds or f"{source} {target}" in golds

    def _ngrams(self, normalized: str) -> Iterable[tuple[str, ...]]:
        words = normalized.split()
        return zip(*(words[start:] for start in range(self._ngram_words)), strict=False)
