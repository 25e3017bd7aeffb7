"""Texts that begin alike, laid out so that their common beginning is computed once.

All prompts of a task open with the same instruction: from a sixth of a sample's tokens (headlines) to more than half
(tags). Under one adapter those tokens have the same activations in every text, and a layer need not see them twice. A
row then holds the beginning, followed by what is each text's own; only attention knows where one text ends. A batch of
several tasks becomes several such rows.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LINE_TOKENS = 16
"""Tokens that could be trained in the time that one more line takes, whatever is in it."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A row of `prefix` tokens shared by `texts` texts, then `tokens` tokens of each text's own."""

    prefix: int
    texts: int
    tokens: int

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prefix + self.texts * self.tokens

    def positions(self, device: torch.device) -> Tensor:
        """Each token's position in its text, [width]."""
        whole = torch.arange(self.prefix + self.tokens, device=device)
        return torch.cat([whole[: self.prefix], whole[self.prefix :].repeat(self.texts)])

    def unpack(self, x: Tensor) -> Tensor:
        """[rows, width, ...] -> [rows * texts, prefix + tokens, ...]: every text as a row of its own."""
        own = x[:, self.prefix :].unflatten(1, (self.texts, self.tokens))
        shared = x[:, None, : self.prefix].expand(-1, self.texts, *x[:, : self.prefix].shape[1:])
        return torch.cat([shared, own], 2).flatten(0, 1)

    def pack(self, x: Tensor) -> Tensor:
        """The inverse of `unpack`: [rows * texts, prefix + tokens, ...] -> [rows, width, ...]."""
        x = x.unflatten(0, (-1, self.texts))
        return torch.cat([x[:, 0, : self.prefix], x[:, :, self.prefix :].flatten(1, 2)], 1)


@dataclass(frozen=True, slots=True)
class Line:
    """Texts of a batch, by their places in it, that all begin with `prefix` tokens; the longest has `longest`."""

    texts: tuple[int, ...]
    prefix: int
    longest: int

    def halves(self) -> tuple[Line, Line]:
        """The same texts in two lines."""
        middle = len(self.texts) // 2
        return tuple(Line(part, self.prefix, self.longest) for part in (self.texts[:middle], self.texts[middle:]))


@dataclass(frozen=True, slots=True)
class Shape:
    """What lines come to that go through the base together: `texts` in all, `most` in one line, the longest of so many
    tokens; all lines begin with `prefix` tokens of their own.
    """

    lines: int
    prefix: int
    texts: int
    most: int
    longest: int

    @classmethod
    def of(cls, line: Line) -> Shape:
        """Of a line alone."""
        return cls(1, line.prefix, len(line.texts), len(line.texts), line.longest)

    def __add__(self, other: Shape) -> Shape:
        return Shape(
            self.lines + other.lines, min(self.prefix, other.prefix), self.texts + other.texts,
            max(self.most, other.most), max(self.longest, other.longest),
        )  # fmt: skip

    @property
    def packing(self) -> Packing | None:
        """A line a row, where that is shorter than a row for every text."""
        packing = Packing(self.prefix, self.most, self.longest - self.prefix)
        return packing if self.lines * packing.width < self.texts * self.longest else None

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        packing = self.packing
        return self.lines * packing.width if packing else self.texts * self.longest


def lay_out(
    lines: Sequence[Line], texts: Sequence[Sequence[np.ndarray]]
) -> tuple[np.ndarray, list[np.ndarray], Packing | None]:
    """Lines as input ids [rows, width]; where each text's tokens went (flattened places, a text after the other); and
    the packing: with it a line is a row, without it a text is. texts: the token ids of each line's texts.
    """
    shape = functools.reduce(Shape.__add__, map(Shape.of, lines))
    packing = shape.packing
    prefix, step, width = (packing.prefix, packing.tokens, packing.width) if packing else (0, 0, shape.longest)
    ids = np.zeros((shape.lines if packing else shape.texts, width), dtype=np.int64)
    places: list[np.ndarray] = []
    for index, of_line in enumerate(texts):
        for number, text in enumerate(of_line):
            row, shift = (index, number * step) if packing else (len(places), 0)
            place = np.arange(len(text))
            place[prefix:] += shift
            ids[row, place] = text
            places.append(place + row * width)
    return ids, places, packing


class Beginnings:
    """How texts begin alike, to cut any batch of them into the lines that take the fewest tokens."""

    def __init__(self, texts: Sequence[Sequence[int]], limits: Sequence[int]):
        """limits: how much of each text may be shared at most (what predicts its targets has to be its own)."""
        texts = [list(text) for text in texts]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        self._lengths, self._limits = list(map(len, texts)), list(limits)
        self._rank = {index: rank for rank, index in enumerate(order)}
        # In this order, what two texts share is the least that two neighbours share between them.
        self._shared = [len(os.path.commonprefix([texts[a], texts[b]])) for a, b in itertools.pairwise(order)]

    def lines(self, batch: Sequence[int]) -> list[Line]:
        """Lines for texts given by index, padding counted; each text is in one of them."""
        places = sorted(range(len(batch)), key=lambda place: self._rank[batch[place]])
        ranks = [self._rank[batch[place]] for place in places]
        best: list[tuple[int, list[Line]]] = [(0, [])] + [(1 << 62, [])] * len(places)
        for start in range(len(places)):
            prefix, longest = 1 << 62, 0
            before, lines = best[start]
            for end in range(start, len(places)):
                index = batch[places[end]]
                between = self._shared[ranks[end - 1] : ranks[end]] if end > start else ()
                prefix = min(prefix, self._limits[index], *between)
                longest = max(longest, self._lengths[index])
                tokens = before + prefix + (end + 1 - start) * (longest - prefix) + _LINE_TOKENS
                if tokens < best[end + 1][0]:
                    best[end + 1] = tokens, [*lines, Line(tuple(places[start : end + 1]), prefix, longest)]
        return best[-1][1]
