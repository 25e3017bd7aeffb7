"""Answers to many queries at once, each row with its own adapter: decoding with a cache, and label likelihoods.

Rows are sorted by length and adapter, cut into batches and decoded together; a prefix that an adapter's prompts share
is computed once (`clients.engine.kernels.packing`), and a row that has finished leaves the batch. Greedy decoding
chooses what a row alone would choose, floating-point rounding apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.encoding import truncate_prompt
from untether.clients.engine.kernels.gemm import fast_products
from untether.clients.engine.kernels.kv_cache import PreallocatedCache
from untether.clients.engine.kernels.lines import Line, Prefixes, fill
from untether.clients.engine.kernels.packing import Packing, pack
from untether.clients.engine.lora_layers import Route
from untether.clients.engine.memory import give_back, is_out_of_memory, keep_heap
from untether.sim.core.seeding import generator

BATCH_ROWS = {"cpu": 128, "cuda": 2048}
BATCH_TOKENS = {"cpu": 16384, "cuda": 262144}
"""Most tokens in the cache of a batch: long prompts come in smaller batches."""
_LENGTH_RATIO = 1.25
"""Rows whose prompts differ by no more than this factor are padded to one length."""
_ROW_RATIO = 1.5
"""An adapter that has more prompt to read than so many times the mean of its batch reads it in several rows."""
_COMPACT_BELOW = 0.75
"""Share of live rows below which finished rows are taken out of the batch (that copies the cache)."""


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """A prompt (token ids) and the adapter that answers it: its index in the stack, or None for the bare base."""

    prompt_ids: Sequence[int]
    adapter: int | None = None


def generate(
    base: FrozenBase,
    stack: AdapterStack | None,
    rows: Sequence[GenerationRow],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Generates an answer to every row.

    A batch that runs out of memory is halved and repeated.

    Args:
        base: The frozen base model.
        stack: The adapters that rows name; None where all rows use the bare base.
        rows: Prompts with their adapters. Prompts that leave no space in the context are cut in the middle.
        max_new_tokens: For all rows, or one a row.
        temperature: 0 is greedy; otherwise token t of a row is drawn with that row's own seed, whatever batch it is in.
        seeds: One a row.
        batch_size: Most rows of a batch.
        progress: Called with (rows done, rows in all).

    Returns:
        New token ids of every row, in the order of the rows, without the end token.
    """
    limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if temperature > 0 and seeds is None:
        raise ValueError("sampling needs a seed a row")
    prompts = _fit(base, rows, limits)
    answers: list[list[int]] = [[] for _ in rows]
    wanted = [index for index, limit in enumerate(limits) if limit > 0]
    done = len(rows) - len(wanted)

    def decode(batch: list[int]) -> None:
        nonlocal done
        seeds_of = [seeds[index] for index in batch] if seeds is not None else None
        batch_rows = [GenerationRow(prompts[index], rows[index].adapter) for index in batch]
        found = _Decoding(base, stack, batch_rows, [limits[index] for index in batch], temperature, seeds_of).run()
        for index, tokens in zip(batch, found, strict=True):
            answers[index] = tokens
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))

    keep_heap()
    with torch.inference_mode(), fast_products():
        room = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        for batch in _at_even_pace(_batches(base, wanted, room, rows, batch_size)):
            _halving(decode, batch, base.device)
    give_back()
    return answers


def label_scores(
    base: FrozenBase,
    stack: AdapterStack | None,
    rows: Sequence[GenerationRow],
    labels: Sequence[Sequence[Sequence[int]]],
    *,
    normalize: bool = False,
    batch_size: int | None = None,
) -> list[list[float]]:
    """Returns the log-likelihood of each row's candidate labels after its prompt, which is read once for all of them.

    Args:
        base: The frozen base model.
        stack: The adapters that rows name; None where all rows use the bare base.
        rows: Prompts with their adapters.
        labels: Of each row: token ids of each label, end token included if it is to count.
        normalize: Whether to divide by the label's tokens.
        batch_size: Most rows of a batch.
    """
    longest = [max((len(label) for label in of_row), default=0) for of_row in labels]
    prompts = _fit(base, rows, longest)
    found: list[list[float]] = [[] for _ in rows]

    def judge(batch: list[int]) -> None:
        batch_rows = [GenerationRow(prompts[index], rows[index].adapter) for index in batch]
        scores = _score_batch(base, stack, batch_rows, [labels[index] for index in batch])
        for index, of_row in zip(batch, scores, strict=True):
            lengths = [len(label) if normalize else 1 for label in labels[index]]
            found[index] = [score / length for score, length in zip(of_row, lengths, strict=True)]

    keep_heap()
    with torch.inference_mode(), fast_products():
        wanted = [index for index, of_row in enumerate(labels) if of_row]
        copies = max((len(labels[index]) for index in wanted), default=1)
        room = [len(prompt) + extra for prompt, extra in zip(prompts, longest, strict=True)]
        for batch in _batches(base, wanted, room, rows, batch_size, copies):
            _halving(judge, batch, base.device)
    give_back()
    return found


def _fit(base: FrozenBase, rows: Sequence[GenerationRow], extra: Sequence[int]) -> list[list[int]]:
    """Each row's prompt, cut so that `extra` more tokens fit into the context."""
    return [
        truncate_prompt(row.prompt_ids, max(1, base.context_length - more))
        for row, more in zip(rows, extra, strict=True)
    ]


def _batches(
    base: FrozenBase,
    indices: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[GenerationRow],
    size: int | None,
    copies: int = 1,
) -> list[list[int]]:
    """Batches of rows of similar length (tokens, answers included), each row to be held `copies` times.

    In each, rows of one adapter are neighbours and rows without one come last.
    """
    size = size or BATCH_ROWS.get(base.device.type, 128)
    tokens = BATCH_TOKENS.get(base.device.type, 16384)

    def adapter(index: int) -> float:
        own = rows[index].adapter
        return math.inf if own is None else own

    def bucket(index: int) -> int:
        return int(math.log(lengths[index]) / math.log(_LENGTH_RATIO))

    batches: list[list[int]] = []
    longest = 0
    for index in sorted(indices, key=lambda index: (-bucket(index), adapter(index), index)):
        widest = max(longest, lengths[index])
        held = (len(batches[-1]) + 1) * copies if batches else 0
        # A batch that has found company of its own length is not padded for the sake of shorter rows.
        alike = batches and (bucket(index) == bucket(batches[-1][0]) or len(batches[-1]) < max(8, size // 8))
        if alike and held <= size and held * widest <= tokens:
            batches[-1].append(index)
            longest = widest
        else:
            batches.append([index])
            longest = lengths[index]
    return [sorted(batch, key=lambda index: (adapter(index), list(rows[index].prompt_ids))) for batch in batches]


def _at_even_pace(batches: Sequence[list[int]]) -> Iterator[list[int]]:
    """The longest rows and the shortest in turn, so that rows done tell how long the others will take. A long one
    comes first: what memory there is too little of shows at once.
    """
    for number in range(len(batches)):
        yield batches[number // 2 if number % 2 == 0 else -1 - number // 2]


def _halving(work: Callable[[list[int]], None], batch: list[int], device: torch.device) -> None:
    try:
        work(batch)
        return
    except Exception as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _halving(work, batch[: len(batch) // 2], device)
    _halving(work, batch[len(batch) // 2 :], device)


@dataclass(frozen=True)
class _Packed:
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
    ) -> _Packed:  # fmt: skip
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


class _Prompts:
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
        packed = _Packed.of(self.base, self.stack, self.adapters, prompts, self._flat)
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


class _Decoding:
    def __init__(self, base, stack, rows, limits, temperature, seeds):
        self.base, self.limits, self.temperature = base, limits, temperature
        self.prompts = _Prompts(base, stack, rows, max(limits))
        self.tokens: list[list[int]] = [[] for _ in rows]
        if temperature > 0:
            self.draws = [generator(seed, "token").random(limit) for seed, limit in zip(seeds, limits, strict=True)]

    def run(self) -> list[list[int]]:
        prompts, end_ids = self.prompts, self.base.end_ids
        logits = prompts.logits
        live: list[int | None] = list(range(len(self.tokens)))
        """Rows of the batch by their place; None where a finished row still sits."""
        while True:
            chosen = self._choose(logits, live)
            following = chosen.tolist()
            for place, row in enumerate(live):
                if row is None:
                    continue
                token = following[place]
                if token in end_ids:
                    live[place] = None
                    continue
                self.tokens[row].append(token)
                if len(self.tokens[row]) == self.limits[row]:
                    live[place] = None
            alive = [place for place, row in enumerate(live) if row is not None]
            if not alive:
                return self.tokens
            if len(alive) <= _COMPACT_BELOW * len(live):
                prompts.take(alive)
                chosen = chosen[torch.tensor(alive, device=chosen.device)]
                live = [live[place] for place in alive]
            logits = prompts.read(chosen[:, None], prompts.position[:, None], torch.arange(len(live)))
            prompts.position += 1

    def _choose(self, logits: Tensor, live: Sequence[int | None]) -> Tensor:
        if self.temperature <= 0:
            return logits.argmax(-1)
        at = [0.0 if row is None else float(self.draws[row][len(self.tokens[row])]) for row in live]
        draws = torch.tensor(at, dtype=torch.float64, device=logits.device)
        mass = torch.softmax(logits.double() / self.temperature, -1).cumsum(-1)
        found = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)[:, 0]
        return found.clamp_(max=logits.shape[-1] - 1)


def _score_batch(base, stack, rows, labels) -> list[list[float]]:
    lengths = (len(row.prompt_ids) + max(map(len, of_row)) for row, of_row in zip(rows, labels, strict=True))
    if base.lean is not None and base.lean.splits(max(lengths)):
        return _score_packed(base, stack, rows, labels)
    return _score_cached(base, stack, rows, labels)


def _score_packed(base, stack, rows, labels) -> list[list[float]]:
    """In one pass: a prompt's labels are texts that share it. No cache is copied for each of them."""
    owners = [row for row, of_row in enumerate(labels) for _ in of_row]
    flat = [list(label) for of_row in labels for label in of_row]
    texts = [np.array([*rows[row].prompt_ids, *label[:-1]]) for row, label in zip(owners, flat, strict=True)]
    packed = _Packed.of(base, stack, [rows[row].adapter for row in owners], texts)
    at = [place[-len(label) :] for place, label in zip(packed.places, flat, strict=True)]  # what predicts each token
    places, where = np.unique(np.concatenate(at), return_inverse=True)
    active = stack.active(packed.route) if packed.route is not None else contextlib.nullcontext()
    with active:
        logits = base.logits_at(torch.from_numpy(places), packed.ids, use_cache=False, packing=packed.packing)
    logs = torch.log_softmax(logits.to(_score_dtype(base)), -1)
    tokens = torch.tensor([token for label in flat for token in label], device=base.device)
    each = logs[torch.from_numpy(where).to(base.device), tokens].split([len(label) for label in flat])
    listed = iter(torch.stack([own.sum() for own in each]).tolist())
    return [[next(listed) for _ in of_row] for of_row in labels]


def _score_cached(base, stack, rows, labels) -> list[list[float]]:
    room = max(len(label) for of_row in labels for label in of_row)
    prompts = _Prompts(base, stack, rows, room)
    first = torch.log_softmax(prompts.logits.to(_score_dtype(base)), -1)
    owners = [row for row, of_row in enumerate(labels) for _ in of_row]
    flat = [list(label) for of_row in labels for label in of_row]
    index = torch.tensor(owners, device=base.device)
    scores = first[index, torch.tensor([label[0] for label in flat], device=base.device)]
    if room > 1:
        prompts.take(owners)
        ids = torch.zeros(len(flat), room - 1, dtype=torch.long)
        at, targets, of_label = [], [], []
        for k, label in enumerate(flat):
            ids[k, : len(label) - 1] = torch.tensor(label[:-1], dtype=torch.long)
            at += [k * (room - 1) + t for t in range(len(label) - 1)]
            targets += label[1:]
            of_label += [k] * (len(label) - 1)
        positions = prompts.position[:, None] + torch.arange(room - 1, device=base.device)
        logits = prompts.read(ids.to(base.device), positions, torch.tensor(at, dtype=torch.long))
        rest = torch.log_softmax(logits.to(scores.dtype), -1)
        values = rest.gather(1, torch.tensor(targets, dtype=torch.long, device=base.device)[:, None])[:, 0]
        scores = scores.index_add(0, torch.tensor(of_label, dtype=torch.long, device=base.device), values)
    listed = iter(scores.tolist())
    return [[next(listed) for _ in of_row] for of_row in labels]


def _score_dtype(base: FrozenBase) -> torch.dtype:
    return torch.float64 if base.dtype == torch.float64 else torch.float32
