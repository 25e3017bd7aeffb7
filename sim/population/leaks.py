"""The check for leaks: whether training data gives away a held-out question. It reads every synthetic sample and every
item of another person.

The cloud never sees the held-out queries, but it may have been trained on them (public data), or may quote a history
item that overlaps one; and other people may have the very text that is scored (co-authors, syndicated articles). The
evaluator, which knows the queries, drops such samples and items and counts them; a deployed device has no such check.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

from untether.sim.core.records import Interaction, Query
from untether.sim.population.tasks import get_task

COPIED_WORDS = 20
"""Words in a row that make another person's text a copy. People who write on one thing share shorter runs (set phrases;
in the embedded world, whose words are few, nearly everybody shares eight with somebody), and a cloud that was shown
nothing of a question does not."""

Words = tuple[str, ...]

_QUERIES_HELD = 20_000
_NOTHING: frozenset = frozenset()
_NOT_WORD = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """Normalizes a text: case, accents' encoding, punctuation and spacing removed; words joined by one space.

    A text without any letter or digit (an emoji, "!!") is kept, without spaces at its ends, so that it equals itself
    only.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _NOT_WORD.sub(" ", folded).strip() or folded.strip()


def scored_texts(query: Query) -> tuple[str, ...]:
    """Returns the normalized texts that score a query and so must be in no training pair.

    They are its input and, where the task asks for free text, its gold. Labels and ratings never count. LaMP-1: also
    the query's own title.
    """
    texts = [query.input]
    if get_task(query.task).kind == "generation":
        texts.append(query.gold)
    title, found, _ = query.input.partition(' [1]: "')
    if query.task == "LaMP_1" and found:
        texts.append(title)
    return tuple(normalize(text) for text in texts if text.strip())


class LeakChecker:
    """Judges pairs against a set of held-out queries, task by task.

    A pair is a leak if

    - its normalized input, or its two texts together, equal a query's input (or, in LaMP-1, the query's title), or its
      input shares `ngram_words` words in a row with a query's input (default 8: long enough that two texts on one
      topic rarely share it, short enough to catch a quoted clause);
    - in LaMP-1, its output equals a query's title;
    - for free-text tasks, a gold of at least `gold_words` words (default 3: a shorter gold, "Thanks", is anybody's)
      stands in it, word for word: in its output, in its input, or across both where a tweet was cut in two.

    Class labels and ratings never count.
    """

    def __init__(self, queries: Iterable[Query], ngram_words: int = 8, gold_words: int = 3) -> None:
        if ngram_words < 1 or gold_words < 1:
            raise ValueError(f"ngram_words = {ngram_words}, gold_words = {gold_words}: both must be at least 1")
        self._ngram_words, self._gold_words = ngram_words, gold_words
        self._inputs: dict[str, set[str]] = defaultdict(set)
        self._grams: dict[str, set[Words]] = defaultdict(set)
        self._golds: dict[str, dict[Words, set[Words]]] = defaultdict(lambda: defaultdict(set))  # by first words
        for query in queries:
            source, *others = scored_texts(query) if query.input.strip() else ("", *scored_texts(query))
            self._inputs[query.task].add(source)
            self._grams[query.task].update(_runs(source.split(), ngram_words))
            if get_task(query.task).kind != "generation":
                self._inputs[query.task].update(others)
                continue
            for gold in others:
                if len(words := tuple(gold.split())) >= gold_words:
                    self._golds[query.task][words[:gold_words]].add(words)

    def is_leak(self, task: str, sample_input: str, sample_output: str) -> bool:
        """Returns whether a pair (contents alone, without the task's instruction) gives away a task's held-out query.
        """
        source, target = normalize(sample_input), normalize(sample_output)
        whole, inputs = f"{source} {target}", self._inputs.get(task, _NOTHING)
        if source in inputs or whole in inputs or (task == "LaMP_1" and target in inputs):
            return True
        if not self._grams.get(task, _NOTHING).isdisjoint(_runs(source.split(), self._ngram_words)):
            return True
        return self._holds_gold(task, whole.split())

    def _holds_gold(self, task: str, words: Sequence[str]) -> bool:
        golds = self._golds.get(task, {})
        return any(
            tuple(words[place : place + len(gold)]) == gold
            for place, opening in enumerate(_runs(words, self._gold_words))
            for gold in golds.get(opening, ())
        )


def unscored(
    items: Sequence[Interaction], queries: Iterable[Query], ngram_words: int = COPIED_WORDS
) -> list[Interaction]:
    """Returns the items of other people on which none of these queries is scored, in their order; see `LeakChecker`.

    Holds a few thousand queries at a time, so it reads a fleet of any size in one pass and in little memory.
    """
    left, waiting = list(items), iter(queries)
    while left and (some := list(islice(waiting, _QUERIES_HELD))):
        checker = LeakChecker(some, ngram_words)
        left = [item for item in left if not checker.is_leak(item.task, item.input, item.output)]
    return left


def _runs(words: Sequence[str], length: int) -> Iterable[Words]:
    """All runs of so many words."""
    return zip(*(words[start:] for start in range(length)), strict=False)
