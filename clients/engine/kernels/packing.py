"""Lines of texts laid out in rows without padding (`clients.engine.kernels.lines`).

Texts follow each other in a row, with a line's common prefix once. Only attention knows where a text begins and ends:
it gathers queries and keys from the rows, in groups of similar size, and scatters the results back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from untether.clients.engine.kernels.lines import Line

_ROUND_WIDTH = 16
"""Rows are as wide as a multiple of so many tokens: a product of a new shape is compiled first."""
_LOOK_PAIRS = {"cpu": 4096, "cuda": 1 << 22}
"""Pairs of query and key that attention could do in the time that one more group takes, whatever is in it. On a GPU,
where that is 1 << 24, fewer: what is padded is kept in memory, too."""


@dataclass(frozen=True)
class Index:
    """Maps slots to places: `take` copies to every slot the value of its place; `give` is its adjoint.

    A slot that is padding has a place that is never read, and adds nothing to it.
    """

    source: Tensor
    slots: Tensor
    offsets: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Gathers x [places, ...] -> [slots, width], where width is that of a place's share (a head's)."""
        return x.reshape(len(self.offsets) - 1, -1).index_select(0, self.source)

    def give(self, x: Tensor) -> Tensor:
        """Scatters x [slots, width] -> [places, width] by addition."""
        return torch.embedding_bag(x, self.slots, self.offsets, False, 0, False, None, True)[0]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Texts whose attention is computed together.

    Each has `tokens` queries, which see `prefix` keys before them and, of `tokens` keys of their own, those that are
    not later. bars [texts, prefix]: which of the former are padding.
    """

    texts: int
    prefix: int
    tokens: int
    padding: np.ndarray | None


@dataclass(frozen=True)
class Packing:
    """The layout of texts in rows [rows, width]: each token's position in its text, and the groups of attention.

    split: a text's queries are its own tokens, and the common prefix of a line is a text itself; else a text's queries
    are all its tokens, prefix included (and those that another text of the line computes are idle).
    """

    positions: Tensor
    buckets: tuple[Bucket, ...]
    split: bool
    _queries: _Slots
    _keys: _Slots
    _made: dict = field(default_factory=dict)

    def queries(self, heads: int) -> Index:
        """Returns the index from tokens times heads to the queries: by bucket, each [texts, heads, tokens]."""
        return self._index("queries", self._queries, heads)

    def keys(self, heads: int) -> Index:
        """Returns the index from tokens times heads to the keys: by bucket, each [texts, heads, prefix + tokens]."""
        return self._index("keys", self._keys, heads)

    def _index(self, kind: str, slots: _Slots, heads: int) -> Index:
        if (kind, heads) not in self._made:
            self._made[kind, heads] = slots.index(self.positions.numel(), heads, self.positions.device)
        return self._made[kind, heads]

    def mask(self, bucket: Bucket, groups: int, heads: int, like: Tensor) -> Tensor:
        """Returns a bucket's attention mask [texts * groups, heads * tokens, prefix + tokens]: 0 or, if hidden, -inf.
        """
        key = "mask", id(bucket), groups, heads
        if key not in self._made:
            size = (bucket.tokens, bucket.prefix + bucket.tokens)
            mask = torch.full(size, float("-inf"), dtype=like.dtype, device=like.device).triu_(bucket.prefix + 1)
            mask = mask.repeat(heads, 1).expand(bucket.texts, groups, -1, -1)
            if bucket.padding is not None:
                padding = torch.zeros(bucket.texts, 1, 1, size[1], dtype=torch.bool, device=like.device)
                padding[..., : bucket.prefix] = torch.from_numpy(bucket.padding).to(like.device)[:, None, None]
                mask = mask.masked_fill(padding, float("-inf"))
            self._made[key] = mask.flatten(0, 1)
        return self._made[key]


@dataclass(frozen=True, slots=True)
class _Slots:
    """Slots without heads: each one's place, whether it counts, where its text begins, how many the text has."""

    place: np.ndarray
    real: np.ndarray
    start: np.ndarray
    size: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Slots:
        """parts: (place, real) of each bucket, [texts, slots]."""
        begin, starts, sizes = 0, [], []
        for place, _ in parts:
            texts, size = place.shape
            starts.append(np.repeat(begin + size * np.arange(texts), size))
            sizes.append(np.full(place.size, size))
            begin += place.size
        place, real = (np.concatenate([part[k].ravel() for part in parts]) for k in (0, 1))
        return cls(place, real, np.concatenate(starts), np.concatenate(sizes))

    def index(self, places: int, heads: int, device: torch.device) -> Index:
        head, within = np.arange(heads), np.arange(len(self.place)) - self.start
        at = (heads * self.start + within)[:, None] + head * self.size[:, None]
        source = np.empty(at.size, dtype=np.int64)
        source[at] = self.place[:, None] * heads + head
        order = np.flatnonzero(self.real)
        order = order[np.argsort(self.place[order], kind="stable")]
        place = self.place[order]
        counts = np.bincount(place, minlength=places)
        first = np.cumsum(counts) - counts
        offsets = (heads * first[:, None] + head * counts[:, None]).ravel()
        slots = np.empty(len(order) * heads, dtype=np.int64)
        rank = np.arange(len(order)) - first[place]
        slots[(heads * first[place] + rank)[:, None] + head * counts[place][:, None]] = at[order]
        return Index(*(torch.from_numpy(x).to(device) for x in (source, slots, np.append(offsets, len(slots)))))


class _Entry(NamedTuple):
    """Who attends: where its beginning is and how long, where its own part, and whether it is the first of its line."""

    begin: int
    prefix: int
    at: int
    own: int
    first: bool


def pad(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Puts each text into a row of its own, padded on the right.

    Returns:
        Input ids [texts, width], and the flattened places of each text's tokens.
    """
    ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return ids, [np.arange(len(text)) + index * ids.shape[1] for index, text in enumerate(texts)]


def pack(
    rows: Sequence[Sequence[Line]], texts: Sequence[Sequence[np.ndarray]], device: torch.device, split: bool
) -> tuple[np.ndarray, list[np.ndarray], Packing]:
    """Puts lines into rows.

    Args:
        rows: The lines of each row.
        texts: The token ids of each row's texts, line after line.
        device: Where the packing's tensors go.
        split: See `Packing`.

    Returns:
        Input ids [rows, width]; the flattened places of each text's tokens, text after text; and the packing.
    """
    # The last place of every row stays empty: slots that are padding read it.
    width = max(sum(line.tokens for line in lines) for lines in rows) + 1
    width = -(-width // _ROUND_WIDTH) * _ROUND_WIDTH
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros_like(ids)
    places: list[np.ndarray] = []
    entries: list[_Entry] = []
    for row, (lines, of_row) in enumerate(zip(rows, texts, strict=True)):
        at, left = 0, iter(of_row)
        for line in lines:
            begin, prefix = at, line.prefix
            if split and prefix:
                entries.append(_Entry(0, 0, row * width + begin, prefix, False))
            for number, _ in enumerate(line.texts):
                text = next(left)
                at = at if number else begin + prefix
                own = len(text) - prefix
                place = np.concatenate([np.arange(begin, begin + prefix), np.arange(at, at + own)])
                ids[row, place] = text
                positions[row, place] = np.arange(len(text))
                places.append(place + row * width)
                entries.append(_Entry(row * width + begin, prefix, row * width + at, own, number == 0))
                at += own
    buckets, queries, keys = [], [], []
    for group in _groups(entries, split, _LOOK_PAIRS.get(device.type, 4096)):
        begin, prefix, at, own, first = (np.array(column)[:, None] for column in zip(*group, strict=True))
        empty = (at // width + 1) * width - 1
        if split:
            ahead, most = prefix.max(), own.max()
            column = np.arange(most)
            query = column < own, at + column
            column = np.arange(ahead) - (ahead - prefix)
            before = column >= 0, begin + column
            key = tuple(np.concatenate(pair, 1) for pair in zip(before, query, strict=True))
            padding = None if before[0].all() else ~before[0]
        else:
            ahead, most, padding = 0, (prefix + own).max(), None
            column = np.arange(most)
            key = column < prefix + own, np.where(column < prefix, begin + column, at + column - prefix)
            query = key[0] & (first | (column >= prefix)), key[1]
        buckets.append(Bucket(len(group), int(ahead), int(most), padding))
        queries.append((np.where(*query, empty), query[0]))
        keys.append((np.where(*key, empty), key[0]))
    where = torch.from_numpy(positions).to(device)
    return ids, places, Packing(where, tuple(buckets), split, _Slots.joined(queries), _Slots.joined(keys))


def _groups(entries: Sequence[_Entry], split: bool, overhead: int) -> list[list[_Entry]]:
    """Entries of like size together, so that padding costs less than another group would, and never more than the
    texts themselves and one group: each entry may add little to what many of them sum up to.
    """

    def size(entry: _Entry) -> tuple[int, int]:
        return (entry.prefix, entry.own) if split else (0, entry.prefix + entry.own)

    groups: list[list[_Entry]] = []
    before = most = pairs = needed = 0
    for entry in sorted(entries, key=size):
        prefix, own = size(entry)
        alone = own * (prefix + own)
        joint = max(before, prefix), max(most, own)
        together = (len(groups[-1]) + 1) * joint[1] * sum(joint) if groups else 0
        if groups and together <= min(pairs + alone, 2 * (needed + alone)) + overhead:
            groups[-1].append(entry)
            (before, most), pairs, needed = joint, together, needed + alone
        else:
            groups.append([entry])
            before, most, pairs, needed = prefix, own, alone, alone
    return groups
