"""BM25 over the user's own history: the retrieval of the rag arm.

Only items that precede the query may be retrieved, and later items must not change a word's weight either: the index is
built over the visible items alone.
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
    """Returns the lower-cased runs of letters and digits, without stop words or stemming."""
    return _WORD.findall(text.casefold())


class Retriever:
    """A BM25 index over one task's history (Lucene's variant, k1 = 1.5, b = 0.75, by bm25s), for many queries.

    A document is an item's output and input together.
    """

    def __init__(self, history: Sequence[Interaction]) -> None:
        self.history = tuple(history)
        self._documents = [words(f"{item.output} {item.input}") for item in self.history]
        self._indexes: dict[int, bm25s.BM25 | None] = {}

    def retrieve(self, query: Query | str, k: int, visible: int | None = None) -> list[Interaction]:
        """Returns the best items for a query, best first.

        Equal scores keep the history's order; items that share no word with the query come last.

        Args:
            query: The query or its text.
            k: How many items; fewer are returned where fewer are visible.
            visible: How many leading items of the history may be seen; by default the query's own `visible`, else all.
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
    """Returns the `k` items of `history` that BM25 ranks first for the query.

    Pass only items that the query may see: its `visible` is not read here. See `Retriever.retrieve`.
    """
    return Retriever(history).retrieve(query, k, visible=len(history))
