"""Reading: texts of several adapters go through the base together, and prompts stay in a cache to go on from.

What an adapter's texts begin with in common is read once (`clients.engine.kernels.packing`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.kernels.kv_cache import PreallocatedCache
from untether.clients.engine.kernels.lines import Line, Prefixes, fill
from untether.clients.engine.kernels.packing import Packing, pack
from untether.clients.engine.lora_layers import Route

_ROW_RATIO = 1.5
"""An adapter that has more prompt to read than so many times the mean of its batch reads it in several rows."""


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """A prompt (token ids) and the adapter that answers it: its index in the stack, or None for the bare base."""

    prompt_ids: Sequence[int]
    adapter: int | None = None


@dataclass(frozen=True)
class PackedTexts:
    """Texts laid out in rows without padding, beginnings that they share once, and what their rows wear.

    Attributes: `ids` [rows, width], the flattened `places` of each text's tokens, the `packing`, and the `route`.
    """

    ids: Tensor
    places: list[np.ndarray]
    packing: Packing
    route: Route | None

    @classmethod
    def of(
        cls, base: FrozenBase, stack: AdapterStack | None, adapters: Sequence[int | None], texts: Sequence[np.ndarray],
        flat: Tensor | None = None,
    ) -> PackedTexts:  # fmt: skip
        """Texts of one adapter are neighbours, and those without one come last. flat: the adapters' weights in the
        order in which they come, where somebody has them.
        """
        assert base.lean is not None
        rows = _rows(adapters, texts)
        by_row = [[index for line in row for index in line.texts] for of_one in rows.values() for row in of_one]
        own = [[texts[index] for index in of_row] for of_row in by_row]
        split = base.lean.splits(max(map(len, texts)))
        ids, found, packing = pack(list(itertools.chain(*rows.values())), own, base.device, split)
        places = dict(zip(itertools.chain(*by_row), found, strict=True))
        worn, route = [adapter for adapter in rows if adapter is not None], None
        if worn and stack is not None:
            counts = [len(rows[adapter]) for adapter in worn]
            route = stack.route(worn, counts, len(ids), _weights(stack, worn) if flat is None else flat)
        return cls(torch.from_numpy(ids).to(base.device), [places[k] for k in range(len(texts))], packing, route)


def _weights(stack: AdapterStack, slots: list[int]) -> Tensor:
    """[slots, size]: the stack's own matrix where all of it is meant."""
    return stack.flat if slots == list(range(len(stack))) else stack.flat[torch.tensor(slots, device=stack.flat.device)]


def _rows(adapters: Sequence[int | None], texts: Sequence[np.ndarray]) -> dict[int | None, list[list[Line]]]:
    """Each adapter's texts in rows of lines; lines name texts by their place in the batch."""
    groups: dict[int | None, list[Line]] = {}
    for adapter, group in itertools.groupby(range(len(texts)), key=adapters.__getitem__):
        own = list(group)
        found = Prefixes([texts[k].tolist() for k in own], [len(texts[k]) - 1 for k in own]).lines(range(len(own)))
        groups[adapter] = [dataclasses.replace(x, texts=tuple(own[k] for k in x.texts)) for x in found]
    # A row an adapter makes the cheapest products, unless one has far more to read than the others.
    totals = [sum(line.tokens for line in lines) for adapter, lines in groups.items() if adapter is not None]
    usual = int(_ROW_RATIO * sum(totals) / len(totals)) if totals else sum(map(len, texts))
    width = max(usual, *map(len, texts))
    return {adapter: fill(lines, width) for adapter, lines in groups.items()}


class ReadPrompts:
    """A batch whose prompts have been read: cache, mask, positions, the last position's logits, and who wears what."""

    def __init__(self, base: FrozenBase, stack: AdapterStack | None, rows: Sequence[GenerationRow], room: int):
        self.base, self.stack = base, stack
        self.adapters = [row.adapter for row in rows]
        self.slots = list(dict.fromkeys(adapter for adapter in self.adapters if adapter is not None))
        if self.slots and stack is None:
            raise ValueError("rows name adapters and there is no stack")
        device = base.device
        prompts = [np.asarray(row.prompt_ids, dtype=np.int64) for row in rows]
        longest = max(map(len, prompts))
        mask = torch.zeros(len(rows), longest + room, dtype=torch.long)
        mask[:, longest:] = 1
        for index, prompt in enumerate(prompts):
            mask[index, longest - len(prompt) : longest] = 1
        self.padded = bool((mask == 0).any())
        self.mask = mask.to(device)
        self.position = self.mask[:, :longest].sum(1)
        self.cache = PreallocatedCache(base.model.config, longest + room)
        self._seen = 0
        if self.slots and stack is not None:
            self._flat = _weights(stack, self.slots)
        if base.lean is not None:
            self.logits = self._read_prompts(prompts, longest)
            return
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            ids[index, longest - len(prompt) :] = torch.from_numpy(prompt)
        last = torch.arange(1, len(rows) + 1) * longest - 1
        self.logits = self.read(ids.to(device), (self.mask[:, :longest].cumsum(1) - 1).clamp_(min=0), last)

    def _read_prompts(self, prompts: Sequence[np.ndarray], longest: int) -> Tensor:
        """Logits after the prompts. They are read packed and right-padded, where causal order is mask enough, and kept
        left-padded, so that all go on in the same column.
        """
        assert self.base.lean is not None
        self._seen = longest
        packed = PackedTexts.of(self.base, self.stack, self.adapters, prompts, self._flat)
        kept = torch.zeros(len(prompts), longest, dtype=torch.long)
        for index, place in enumerate(packed.places):
            kept[index, longest - len(place) :] = torch.from_numpy(place)
        last = np.array([place[-1] for place in packed.places])
        order = np.argsort(last)
        inputs = {"packing": packed.packing, "kept": kept.to(self.base.device)}
        logits = self._logits_at(torch.from_numpy(last[order]), packed.ids, packed.route, **inputs)
        return logits[torch.from_numpy(np.argsort(order)).to(self.base.device)]

    def read(self, ids: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        """Feed tokens [rows, n] and return the logits at flattened places `at`; the cache grows by n."""
        self._seen += ids.shape[1]
        mask = {"attention_mask": self.mask[:, : self._seen]} if self.padded else {}
        return self._logits_at(at, ids, self._route(ids.shape[0]), position_ids=positions, **mask)

    def _logits_at(self, at: Tensor, ids: Tensor, route: Route | None, **inputs) -> Tensor:
        """Logits at flattened places of ids, whose rows wear what the route says; the cache grows."""
        with self.stack.active(route) if self.stack is not None and route is not None else contextlib.nullcontext():
            return self.base.logits_at(at, ids, past_key_values=self.cache, use_cache=True, **inputs)

    def take(self, rows: list[int]) -> None:
        """Keep (or repeat, in order) these rows only."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.take(index)
        self.mask, self.position = self.mask[index], self.position[index]
        self.adapters = [self.adapters[row] for row in rows]
        self._made = None

    _made: Route | None = None
    _flat: Tensor | None = None

    def _route(self, rows: int) -> Route | None:
        if self._made is None and self.slots and self.stack is not None:
            counts = [self.adapters.count(slot) for slot in self.slots]
            self._made = self.stack.route(self.slots, counts, rows, self._flat)
        return self._made
