"""Texts with a common prefix, which is computed once for all of them.

All prompts of a task begin with the same instruction: from a sixth of a sample's tokens (headlines) to more than half
(tags). Under one adapter those tokens have the same activations in every text, and a layer need not see them twice. So
a batch is cut into lines, texts with a common prefix, and lines are put into rows (`clients.engine.kernels.packing`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

_LINE_TOKENS = 2
"""Tokens that could be trained in the time that one more line takes, whatever is in it."""


@dataclass(frozen=True, slots=True)
class Line:
    """Texts of a batch, by their places in it and their lengths, that all begin with the same `prefix` tokens."""

    texts: tuple[int, ...]
    prefix: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens, the beginning counted once."""
        return sum(self.lengths) - (len(self.lengths) - 1) * self.prefix

    def parts(self, most: int) -> list[Line]:
        """Returns the same texts in lines of at most `most` tokens (or one text)."""
        if self.tokens <= most or len(self.texts) == 1:
            return [self]
        return [part for half in self.halves() for part in half.parts(most)]

    def halves(self) -> tuple[Line, Line]:
        """Returns the same texts in two lines."""
        middle = len(self.texts) // 2
        first, second = slice(None, middle), slice(middle, None)
        return tuple(Line(self.texts[part], self.prefix, self.lengths[part]) for part in (first, second))


class Prefixes:
    """The common prefixes of texts, for cutting any batch of them into the lines that take the fewest tokens.

    Args:
        texts: Token ids.
        limits: How much of each text may be shared at most (positions that predict its targets must be its own).
    """

    def __init__(self, texts: Sequence[Sequence[int]], limits: Sequence[int]):
        """limits: how much of each text may be shared at most (what predicts its targets has to be its own)."""
        texts = [list(text) for text in texts]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        self._lengths, self._limits = list(map(len, texts)), list(limits)
        self._rank = {index: rank for rank, index in enumerate(order)}
        # In this order, what two texts share is the least that two neighbours share between them.
        self._shared = [len(os.path.commonprefix([texts[a], texts[b]])) for a, b in itertools.pairwise(order)]

    def lines(self, batch: Sequence[int]) -> list[Line]:
        """Returns lines for texts given by index; each text is in one of them."""
        places = sorted(range(len(batch)), key=lambda place: self._rank[batch[place]])
        indices = [batch[place] for place in places]
        ranks = [self._rank[index] for index in indices]
        best: list[tuple[int, int, int]] = [(0, 0, 0)] + [(1 << 62, 0, 0)] * len(places)
        """By how many texts are laid out: (tokens, where the last line starts, its beginning)."""
        for start in range(len(places)):
            prefix, total = 1 << 62, 0
            for end in range(start, len(places)):
                between = self._shared[ranks[end - 1] : ranks[end]] if end > start else ()
                prefix = min(prefix, self._limits[indices[end]], *between)
                total += self._lengths[indices[end]]
                tokens = best[start][0] + total - (end - start) * prefix + _LINE_TOKENS
                if tokens < best[end + 1][0]:
                    best[end + 1] = tokens, start, prefix
        lines, end = [], len(places)
        while end:
            _, start, prefix = best[end]
            lengths = tuple(self._lengths[index] for index in indices[start:end])
            lines.append(Line(tuple(places[start:end]), prefix if end - start > 1 else 0, lengths))
            end = start
        return lines[::-1]


def fill(lines: Sequence[Line], width: int) -> list[list[Line]]:
    """Returns lines, in order, in rows of at most `width` tokens (or one text); a line that is longer is cut."""
    rows: list[list[Line]] = []
    left = 0
    for line in (part for whole in lines for part in whole.parts(width)):
        if not rows or line.tokens > left:
            rows.append([])
            left = width
        rows[-1].append(line)
        left -= line.tokens
    return rows
