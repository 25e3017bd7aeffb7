"""Answers to many queries at once, each row with its own adapter: decoding with a cache, and label likelihoods.

Rows are sorted by length and adapter, cut into batches and decoded together; a prefix that an adapter's prompts share
is read once (`clients.engine.reading`), and a row that has finished leaves the batch. Greedy decoding
chooses what a row alone would choose, floating-point rounding apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.encoding import truncate_prompt
from untether.clients.engine.kernels.gemm import fast_products
from untether.clients.engine.memory import give_back, is_out_of_memory, keep_heap
from untether.clients.engine.reading import GenerationRow, PackedTexts, ReadPrompts
from untether.sim.core.seeding import generator

BATCH_ROWS = {"cpu": 128, "cuda": 2048}
BATCH_TOKENS = {"cpu": 8192, "cuda": 262144}
"""Most tokens in the cache of a batch: long prompts come in smaller batches."""
_LENGTH_RATIO = 1.25
"""Rows whose prompts differ by no more than this factor are padded to one length."""
_COMPACT_BELOW = 0.75
"""Share of live rows below which finished rows are taken out of the batch (that copies the cache)."""


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
    tokens = BATCH_TOKENS.get(base.device.type, 8192)

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


class _Decoding:
    def __init__(self, base, stack, rows, limits, temperature, seeds):
        self.base, self.limits, self.temperature = base, limits, temperature
        self.prompts = ReadPrompts(base, stack, rows, max(limits))
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
    packed = PackedTexts.of(base, stack, [rows[row].adapter for row in owners], texts)
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
    prompts = ReadPrompts(base, stack, rows, room)
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
