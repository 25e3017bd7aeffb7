"""BM25 over the user's own history: what the rag arm puts into a prompt.

Only what precedes the query may be retrieved, and nothing later may even shift a word's weight: the index is built
over the visible items alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import numpy as np

from untether.sim.core.records import Interaction, Query

_WORD = re.compile(r"\w+")
INDEXES_KEPT = 8


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits. No stop words, no stemming: "to be or not to be" keeps all six."""
    return _WORD.findall(text.casefold())


class Retriever:
    """An index over one task's history, for many queries. Documents are the pairs: output and input together.

    BM25 in Lucene's variant (k1 = 1.5, b = 0.75), by bm25s.
    """

    def __init__(self, history: Sequence[Interaction]) -> None:
        self.history = tuple(history)
        self._documents = [words(f"{item.output} {item.input}") for item in self.history]
        self._indexes: dict[int, bm25s.BM25 | None] = {}

    def retrieve(self, query: Query | str, k: int, visible: int | None = None) -> list[Interaction]:
        """The `k` best of the first `visible` items (default: the query's own `visible`, else all), best first.

        Equal scores keep the history's order; items that share no word with the query come last. Fewer than `k`
        where fewer are visible.
        """
        if visible is None:
            visible = getattr(query, "visible", None)
        count = len(self.history) if visible is None else max(0, min(visible, len(self.history)))
        text = query if isinstance(query, str) else query.input
        order = np.argsort(-self._scores(words(text), count), kind="stable")
        return [self.history[row] for row in order[: max(0, k)]]

    def _scores(self, tokens: list[str], count: int) -> np.ndarray:
        """BM25 of the first `count` items, `[count]`."""
        index = self._index(count)
        if index is None:
            return np.zeros(count)
        return index.get_scores_from_ids(index.get_tokens_ids(tokens))

    def _index(self, count: int) -> bm25s.BM25 | None:
        """The index of the first `count` items; None where they hold no word."""
        if count not in self._indexes:
            if len(self._indexes) >= INDEXES_KEPT:
                self._indexes.pop(next(iter(self._indexes)))
            index = None
            if any(self._documents[:count]):
                index = bm25s.BM25(backend="numpy")
                index.index(self._documents[:count], show_progress=False)
            self._indexes[count] = index
        return self._indexes[count]


def retrieve(history: Sequence[Interaction], query: Query | str, k: int) -> list[Interaction]:
    """The `k` items of `history` that BM25 ranks first for the query; pass only items that the query may see.

    A query's `visible` is not read here. Ties keep the history's order; see `Retriever.retrieve`.
    """
    return Retriever(history).retrieve(query, k, visible=len(history))
