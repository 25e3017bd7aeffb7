"""Training many private adapters together on one frozen base.

Every job keeps its own batches, loss mean, clipping, learning rate, step count and optimizer history; what jobs share
is the pass through the base. At each turn the jobs in memory take one step: sorted by the shape of their next batch,
they are cut into passes of a bounded number of tokens (few enough for the processor's caches), each pass runs forward
and backward once, and its adapters step right away. What all examples of a job begin with is computed once a batch
(`clients.packing`). A finished job leaves and a waiting one takes its place. Only floating point rounding depends on
who trains together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from clients.adapters import AdapterStack
from clients.base import FrozenBase
from clients.encoding import truncate_prompt
from clients.gemm import fast_products
from clients.jobs import Example, TrainJob, TrainSettings, batch_plan
from clients.kernels import TokenLosses
from clients.lora_layers import Route
from clients.memory import activation_bytes_per_token, budget_bytes, give_back, is_out_of_memory, keep_heap
from clients.optimizer import CohortAdamW, Update
from clients.packing import Packing, common_prefix
from sim.seeding import derive

__all__ = ["Example", "TrainJob", "TrainResult", "TrainSettings", "batch_plan", "train"]

PASS_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Padded tokens of one forward and backward pass: on a CPU its activations should stay near the caches."""
_PASS_OVERHEAD = {"cpu": 256, "cuda": 4096}
"""Tokens that could be trained in the time that a pass costs whatever its size: batches of different shapes share a
pass only if that pads less."""
_ROUND_TARGETS = 64
"""The places of a pass that the head sees are filled up to a multiple: a product of a new shape is compiled first."""


@dataclass
class TrainResult:
    """What a job learned: the adapter under PEFT's keys, and per step the loss, learning rate and (unpadded) tokens.

    outcome is `ok`, or `out_of_memory` where even a single example of the job did not fit (the state is the last one).
    """

    state: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    tokens_by_step: list[int] = field(default_factory=list)
    outcome: str = "ok"

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    @property
    def tokens(self) -> int:
        """Tokens trained on, prompts included, padding not."""
        return sum(self.tokens_by_step)


def train(
    base: FrozenBase,
    jobs: Sequence[TrainJob],
    *,
    memory_bytes: int | None = None,
    max_cohort: int | None = None,
    pass_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Hashable, TrainResult]:
    """Train all jobs; returns their results by key, in the order of the jobs.

    memory_bytes: budget for adapters and activations (default: `budget_bytes`). max_cohort: most adapters in
    memory at once. pass_tokens: padded tokens a pass. progress(steps done, steps in all) is called after every turn. A
    pass that runs out of memory is split and repeated; the bound then stays lower.
    """
    keys = [job.key for job in jobs]
    if len(set(keys)) != len(keys):
        raise ValueError("two jobs have the same key")
    if not jobs:
        return {}
    keep_heap()
    with fast_products():
        results = _Engine(base, jobs, memory_bytes, max_cohort, pass_tokens, progress).run()
    give_back()
    return results


@dataclass(eq=False)
class _Run:
    """A job under way."""

    job: TrainJob
    examples: list[tuple[np.ndarray, np.ndarray]]
    plan: list[list[int]]
    slot: int
    prefix: int
    """Tokens that all examples begin with, where the base can share them."""
    result: TrainResult
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def batch(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input ids, target ids) of the next batch; the last target is never an input."""
        return [self.examples[index] for index in self.plan[self.step]]

    def length(self) -> int:
        """Tokens of the longest row of the next batch."""
        return max(len(ids) for ids, _ in self.batch())


@dataclass(eq=False)
class _Pass:
    """Runs that take their next step together: `rows` examples in all, `most` of one run, the longest of so many
    tokens; all begin with `prefix` tokens of their run's.
    """

    members: list[_Run]
    prefix: int
    rows: int
    most: int
    longest: int

    @classmethod
    def of(cls, run: _Run) -> _Pass:
        rows = len(run.plan[run.step])
        return cls([run], run.prefix, rows, rows, run.length())

    def joined(self, other: _Pass) -> _Pass:
        """Both together."""
        return _Pass(
            self.members + other.members, min(self.prefix, other.prefix), self.rows + other.rows,
            max(self.most, other.most), max(self.longest, other.longest),
        )  # fmt: skip

    @property
    def packing(self) -> Packing | None:
        """A member a row, where that is shorter than a row for every example."""
        packing = Packing(self.prefix, self.most, self.longest - self.prefix)
        return packing if len(self.members) * packing.width < self.rows * self.longest else None

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        packing = self.packing
        return len(self.members) * packing.width if packing else self.rows * self.longest


class _Engine:
    def __init__(self, base, jobs, memory_bytes, max_cohort, pass_tokens, progress):
        self.base, self.jobs, self.progress = base, list(jobs), progress
        self.results: dict[Hashable, TrainResult] = {}
        waiting = [job for job in jobs if job.total_steps]
        self.waiting = sorted(waiting, key=lambda job: -_mean_length(job))
        self.total, self.done = sum(job.total_steps for job in jobs), 0
        self.runs: list[_Run] = []
        budget = budget_bytes(memory_bytes, base.device)
        per_token = activation_bytes_per_token(base.model.config, base.model.dtype.itemsize)
        self.pass_tokens = pass_tokens or max(1, min(PASS_TOKENS.get(base.device.type, 4096), budget // 2 // per_token))
        self.capacity = 0
        if waiting:
            # A stack of one adapter of each shape tells the layout's size before the whole cohort is allocated.
            shapes = list(dict.fromkeys(job.spec for job in waiting))
            size = AdapterStack(base, shapes).bytes_per_adapter
            room = max(1, (budget - self.pass_tokens * per_token) // size)
            self.capacity = min(len(waiting), room, max_cohort or len(waiting))

    def run(self) -> dict[Hashable, TrainResult]:
        while self.waiting:
            try:
                self._cohort()
            except Exception as error:
                if not is_out_of_memory(error) or self.capacity == 1:
                    raise
                self.capacity = max(1, self.capacity // 2)
                self.waiting = [run.job for run in self.runs] + self.waiting
        for job in self.jobs:
            if job.key not in self.results:
                stack = AdapterStack(self.base, [job.spec])
                stack.assign(0, job.spec, _init_seed(job), job.state)
                self.results[job.key] = TrainResult(stack.state(0))
        return {job.key: self.results[job.key] for job in self.jobs}

    def _cohort(self) -> None:
        """Train waiting jobs through `capacity` slots until none waits and none runs."""
        shapes = [job.spec for job in self.waiting]
        widest = list(dict.fromkeys(shapes))
        filler = [widest[min(k, len(widest) - 1)] for k in range(max(self.capacity, len(widest)))]
        self.stack = AdapterStack(self.base, filler)
        self.optimizer = CohortAdamW(self.stack.flat)
        self.runs = []
        free = list(range(min(self.capacity, len(self.waiting))))
        while free or self.runs:
            self.runs += [self._start(slot) for slot in free if self.waiting]
            for members in self._passes(self.runs):
                self._advance(members)
            ended = [run for run in self.runs if run.step == len(run.plan) or run.result.outcome != "ok"]
            for run in ended:
                self._finish(run)
            self.runs = [run for run in self.runs if run not in ended]
            free = [run.slot for run in ended] if self.waiting else []
            if self.progress is not None:
                self.progress(self.done + sum(run.step for run in self.runs), self.total)

    def _start(self, slot: int) -> _Run:
        job = self.waiting.pop(0)
        self.stack.assign(slot, job.spec, _init_seed(job), job.state)
        self.optimizer.reset(slot)
        rows = [_row(example, self.base.context_length) for example in job.examples]
        # Dropout strikes each example's prompt on its own; a model with its own forward pass knows no packing.
        shares = self.base.lean is not None and not job.spec.dropout
        prefix = min(common_prefix([ids for ids, _ in rows]), *(len(ids) - len(target) for ids, target in rows))
        return _Run(job, rows, batch_plan(job), slot, prefix if shares else 0, TrainResult({}))

    def _finish(self, run: _Run) -> None:
        run.result.state = self.stack.state(run.slot)
        run.result.losses = torch.stack(run.losses).tolist() if run.losses else []
        self.results[run.job.key] = run.result
        self.done += run.job.total_steps

    def _passes(self, runs: list[_Run]) -> list[list[_Run]]:
        """Runs of similar next batches together, as many as fit into a pass."""
        overhead = _PASS_OVERHEAD.get(self.base.device.type, 4096)
        order = sorted(runs, key=lambda run: (len(run.plan[run.step]), run.prefix, run.length(), run.slot))
        passes: list[_Pass] = []
        for run in order:
            alone = _Pass.of(run)
            joint = passes[-1].joined(alone) if passes else None
            if joint and joint.tokens <= min(self.pass_tokens, passes[-1].tokens + alone.tokens + overhead):
                passes[-1] = joint
            else:
                passes.append(alone)
        return [found.members for found in passes]

    def _advance(self, members: list[_Run]) -> None:
        """One optimizer step of every member; in halves if memory runs out."""
        try:
            losses, grads = self._gradients(members)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            losses = grads = None
        if grads is not None:
            self._step(members, losses, grads)
            return
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(members) > 1:
            self.pass_tokens = max(1, self.pass_tokens // 2)
            self._advance(members[: len(members) // 2])
            self._advance(members[len(members) // 2 :])
        else:
            self._advance_by_rows(members[0])

    def _advance_by_rows(self, run: _Run) -> None:
        """One step of a run whose batch does not fit: gradients of its rows one after the other."""
        try:
            losses = grads = 0
            for row in range(len(run.plan[run.step])):
                loss, grad = self._gradients([run], only=row)
                losses, grads = losses + loss, grads + grad
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            run.result.outcome = "out_of_memory"
            return
        self._step([run], losses, grads)

    def _gradients(self, members: list[_Run], only: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss [members] and gradients [members, size] of the members' next batches (or of one row's share)."""
        batches = [run.batch() for run in members]
        weights = [1.0 / sum(len(target) for _, target in batch) for batch in batches]
        if only is not None:
            batches = [batch[only : only + 1] for batch in batches]
        device = self.base.device
        ids, places, counts, packing = _layout(members, batches)
        owners = [index for index, batch in enumerate(batches) for _, target in batch for _ in target]
        targets = np.concatenate([target for batch in batches for _, target in batch])
        # The last place is repeated, weighing 0, up to the round number.
        spare = -len(targets) % _ROUND_TARGETS
        targets, positions = (torch.from_numpy(np.pad(x, (0, spare), "edge")).to(device) for x in (targets, places))
        owner = torch.tensor(owners + owners[-1:] * spare, device=device)
        weight = torch.tensor(weights, dtype=self.stack.dtype, device=device)
        weight_at = weight[owner]
        weight_at[len(owners) :] = 0

        slots = [run.slot for run in members]
        flat = self.stack.flat[torch.tensor(slots, device=device)]
        grads = torch.zeros_like(flat)
        dropout = _Dropout(members, only) if any(run.job.spec.dropout for run in members) else None
        route = self.stack.route(slots, counts, len(ids), flat, grads, dropout)
        inputs = {"packing": packing} if packing else {}
        with self.stack.wearing(route):
            logits = self.base.logits_at(positions, torch.from_numpy(ids).to(device), use_cache=False, **inputs)
            losses = TokenLosses.apply(logits, targets, weight_at)
            losses.sum().backward()
        return torch.zeros_like(weight).index_add_(0, owner, losses.detach()), grads

    def _step(self, members: list[_Run], losses: Tensor, grads: Tensor) -> None:
        updates = []
        for run in members:
            s = run.job.settings
            rate = s.rate_at(run.step, len(run.plan))
            updates.append(Update(run.slot, run.step, rate, s.weight_decay, s.max_grad_norm, s.betas, s.eps))
        self.optimizer.step(updates, grads)
        for index, (run, update) in enumerate(zip(members, updates, strict=True)):
            run.losses.append(losses[index])
            run.result.learning_rates.append(update.learning_rate)
            run.result.tokens_by_step.append(sum(len(ids) for ids, _ in run.batch()))
            run.step += 1


class _Dropout:
    """Inverted dropout masks that depend on (job, step, layer) and the job's own batch, not on who shares the pass."""

    def __init__(self, members: Sequence[_Run], only: int | None):
        self._members = [(run, run.batch(), run.job.spec.dropout) for run in members]
        self._only = only

    def __call__(self, name: str, route: Route, like: Tensor) -> Tensor:
        mask = torch.ones_like(like)
        start = 0
        for (run, batch, rate), count in zip(self._members, route.counts, strict=True):
            if rate:
                tokens = min(like.shape[1], max(len(ids) for ids, _ in batch))
                rows = count if self._only is None else len(batch)
                draw = torch.Generator().manual_seed(derive(run.job.seed, "dropout", run.step, name))
                kept = torch.rand(rows, tokens, like.shape[-1], generator=draw) >= rate
                kept = kept if self._only is None else kept[self._only : self._only + 1]
                mask[start : start + count, :tokens] = kept.to(mask) / (1 - rate)
            start += count
        return mask


def _layout(
    members: list[_Run], batches: list[list[tuple[np.ndarray, np.ndarray]]]
) -> tuple[np.ndarray, np.ndarray, list[int], Packing | None]:
    """A pass as (ids [rows, width], flattened places that predict the targets, rows a member, packing)."""
    counts = [len(batch) for batch in batches]
    longest = max(len(ids) for batch in batches for ids, _ in batch)
    packing = _Pass(members, min(run.prefix for run in members), sum(counts), max(counts), longest).packing
    prefix, step, width = (packing.prefix, packing.tokens, packing.width) if packing else (0, 0, longest)
    ids = np.zeros((len(batches) if packing else sum(counts), width), dtype=np.int64)
    places: list[np.ndarray] = []
    for member, batch in enumerate(batches):
        for text, (own, target) in enumerate(batch):
            row, shift = (member, text * step) if packing else (len(places), 0)
            ids[row, :prefix] = own[:prefix]
            ids[row, prefix + shift : len(own) + shift] = own[prefix:]
            places.append(np.arange(len(own) - len(target), len(own)) + shift + row * width)
    return ids, np.concatenate(places), [1] * len(batches) if packing else counts, packing


def _row(example: Example, context: int) -> tuple[np.ndarray, np.ndarray]:
    """(input ids, target ids): prompt and target but its last token; what does not fit the context is cut."""
    target = list(example.target_ids)[: max(1, context - 1)]
    if not target or not len(example.prompt_ids):
        raise ValueError("an example needs at least one prompt token and one target token")
    prompt = truncate_prompt(example.prompt_ids, max(1, context + 1 - len(target)))
    return np.asarray(prompt + target[:-1], dtype=np.int64), np.asarray(target, dtype=np.int64)


def _mean_length(job: TrainJob) -> float:
    return sum(len(e.prompt_ids) + len(e.target_ids) for e in job.examples) / max(1, len(job.examples))


def _init_seed(job: TrainJob) -> int:
    return derive(job.seed, "adapter") if job.init_seed is None else job.init_seed
