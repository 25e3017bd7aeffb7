"""Training many private adapters together on one frozen base.

Every job keeps its own batches, loss mean, clipping, learning rate, step count and optimizer history; what jobs share
is the pass through the base. At each turn the jobs in memory take one step. A job's batch is cut into lines, texts that
begin alike, whose beginning is computed once (`clients.packing`). The lines of all jobs, sorted by shape, are cut into
passes of a bounded number of tokens (few enough for the processor's caches); each pass runs forward and backward once,
and an adapter steps as soon as all lines of its batch are through. A finished job leaves and a waiting one takes its
place. Only floating point rounding depends on who trains together.
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
from clients.packing import Beginnings, Line, Shape, lay_out
from sim.seeding import derive

__all__ = ["Example", "TrainJob", "TrainResult", "TrainSettings", "batch_plan", "train"]

PASS_TOKENS = {"cpu": 3072, "cuda": 131072}
"""Padded tokens of one forward and backward pass: on a CPU its activations should stay near the caches."""
_PASS_OVERHEAD = {"cpu": 256, "cuda": 65536}
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
    beginnings: Beginnings | None
    """How the examples begin alike, where the base can make use of it."""
    result: TrainResult
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    missing: int = 0
    """Texts of the next batch that no pass has seen yet."""
    loss: Tensor | None = None
    grad: Tensor | None = None

    def batch(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input ids, target ids) of the next batch; the last target is never an input."""
        return [self.examples[index] for index in self.plan[self.step]]

    def shares(self) -> list[_Share]:
        """The next batch, cut into lines."""
        self.missing, self.loss, self.grad = len(self.plan[self.step]), None, None
        if self.beginnings is not None:
            return [_Share(self, line) for line in self.beginnings.lines(self.plan[self.step])]
        longest = max(len(ids) for ids, _ in self.batch())
        return [_Share(self, Line(tuple(range(self.missing)), 0, longest))]


@dataclass(eq=False, slots=True)
class _Share:
    """A line of a run's next batch."""

    run: _Run
    line: Line

    def texts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input ids, target ids) of the line."""
        batch = self.run.batch()
        return [batch[place] for place in self.line.texts]


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
        self.pass_tokens = pass_tokens or PASS_TOKENS.get(base.device.type, 4096)
        self.pass_tokens = max(1, min(self.pass_tokens, budget // 2 // per_token))
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
            for shares in self._passes([share for run in self.runs for share in run.shares()]):
                self._advance(shares)
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
        beginnings = None
        # Dropout strikes each example's prompt on its own; a model with its own forward pass knows no packing.
        if self.base.lean is not None and not job.spec.dropout:
            beginnings = Beginnings([ids.tolist() for ids, _ in rows], [len(ids) - len(target) for ids, target in rows])
        return _Run(job, rows, batch_plan(job), slot, beginnings, TrainResult({}))

    def _finish(self, run: _Run) -> None:
        run.result.state = self.stack.state(run.slot)
        run.result.losses = torch.stack(run.losses).tolist() if run.losses else []
        self.results[run.job.key] = run.result
        self.done += run.job.total_steps

    def _passes(self, shares: list[_Share]) -> list[list[_Share]]:
        """Lines of similar shape together, as many as fit into a pass."""
        overhead = _PASS_OVERHEAD.get(self.base.device.type, 4096)
        passes: list[list[_Share]] = []
        shape: Shape | None = None
        for share in sorted(shares, key=_order):
            alone = Shape.of(share.line)
            joint = shape + alone if shape else None
            if joint and joint.tokens <= min(self.pass_tokens, shape.tokens + alone.tokens + overhead):
                passes[-1].append(share)
                shape = joint
            else:
                passes.append([share])
                shape = alone
        return passes

    def _advance(self, shares: list[_Share]) -> None:
        """Take lines through the base, and step the runs whose batch is complete; in halves if memory runs out."""
        shares = [share for share in shares if share.run.result.outcome == "ok"]
        if not shares:
            return
        try:
            losses, grads = self._gradients(shares)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            losses = grads = None
        if grads is not None:
            self._step(_complete(shares, losses, grads))
            return
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(shares) > 1:
            self.pass_tokens = max(1, self.pass_tokens // 2)
            self._advance(shares[: len(shares) // 2])
            self._advance(shares[len(shares) // 2 :])
        elif len(shares[0].line.texts) > 1:
            for line in shares[0].line.halves():
                self._advance([_Share(shares[0].run, line)])
        else:
            shares[0].run.result.outcome = "out_of_memory"

    def _gradients(self, shares: list[_Share]) -> tuple[Tensor, Tensor]:
        """What lines add to their batch's mean loss, [lines], and to its gradient, [lines, size]."""
        device = self.base.device
        lines, texts = [share.line for share in shares], [share.texts() for share in shares]
        ids, tokens, packing = lay_out(lines, [[ids for ids, _ in line] for line in texts])
        counts = [1 if packing else len(line) for line in texts]
        owners = [index for index, line in enumerate(texts) for _, target in line for _ in target]
        all_targets = [target for line in texts for _, target in line]
        places = np.concatenate([own[-len(target) :] for own, target in zip(tokens, all_targets, strict=True)])
        targets = np.concatenate(all_targets)
        weights = [1.0 / sum(len(target) for _, target in share.run.batch()) for share in shares]
        # The last place is repeated, weighing 0, up to the round number.
        spare = -len(targets) % _ROUND_TARGETS
        targets, places = (torch.from_numpy(np.pad(x, (0, spare), "edge")) for x in (targets, places))
        owner = torch.tensor(owners + owners[-1:] * spare, device=device)
        weight = torch.tensor(weights, dtype=self.stack.dtype, device=device)
        weight_at = weight[owner]
        weight_at[len(owners) :] = 0

        slots = [share.run.slot for share in shares]
        flat = self.stack.flat[torch.tensor(slots, device=device)]
        grads = torch.zeros_like(flat)
        dropout = _Dropout(shares) if any(share.run.job.spec.dropout for share in shares) else None
        route = self.stack.route(slots, counts, len(ids), flat, grads, dropout)
        inputs = {"packing": packing} if packing else {}  # which only a lean base knows
        with self.stack.wearing(route):
            logits = self.base.logits_at(places, torch.from_numpy(ids).to(device), use_cache=False, **inputs)
            losses = TokenLosses.apply(logits, targets.to(device), weight_at)
            losses.sum().backward()
        return torch.zeros_like(weight).index_add_(0, owner, losses.detach()), grads

    def _step(self, runs: list[_Run]) -> None:
        if not runs:
            return
        updates = []
        for run in runs:
            s = run.job.settings
            rate = s.rate_at(run.step, len(run.plan))
            updates.append(Update(run.slot, run.step, rate, s.weight_decay, s.max_grad_norm, s.betas, s.eps))
        self.optimizer.step(updates, [run.grad for run in runs])
        for run, update in zip(runs, updates, strict=True):
            run.losses.append(run.loss)
            run.result.learning_rates.append(update.learning_rate)
            run.result.tokens_by_step.append(sum(len(ids) for ids, _ in run.batch()))
            run.step, run.grad = run.step + 1, None


def _order(share: _Share) -> tuple[int, ...]:
    """Lines of equal shape have equal keys; the beginning of a single text is as good as its own."""
    line = share.line
    return len(line.texts), line.prefix if len(line.texts) > 1 else 0, line.longest, share.run.slot


def _complete(shares: list[_Share], losses: Tensor, grads: Tensor) -> list[_Run]:
    """Hand lines' losses and gradients to their runs; the runs whose batch is complete with them."""
    for share, loss, grad in zip(shares, losses.unbind(), grads.unbind(), strict=True):
        run = share.run
        run.missing -= len(share.line.texts)
        run.loss = loss if run.loss is None else run.loss + loss
        run.grad = grad if run.grad is None else run.grad.add_(grad)
    runs = list(dict.fromkeys(share.run for share in shares))
    for run in runs:
        if run.missing:
            run.grad = run.grad.clone()  # a view would keep the gradients of the whole pass
    return [run for run in runs if not run.missing]


class _Dropout:
    """Inverted dropout masks that depend on (job, step, layer) and the job's own batch, not on who shares the pass."""

    def __init__(self, shares: Sequence[_Share]):
        self._shares = [(share, share.run.batch(), share.run.job.spec.dropout) for share in shares]

    def __call__(self, name: str, route: Route, like: Tensor) -> Tensor:
        """like: [texts, tokens, width] of the pass, or [targets, 1, width] where only those are left."""
        mask = torch.ones_like(like)
        start = 0
        for (share, batch, rate), count in zip(self._shares, route.counts, strict=True):
            if rate:
                run, whole = share.run, like.shape[1] > 1
                longest = max(len(ids) for ids, _ in batch) if whole else 1
                rows = np.repeat(np.arange(len(batch)), [1 if whole else len(target) for _, target in batch])
                draw = torch.Generator().manual_seed(derive(run.job.seed, "dropout", run.step, name))
                kept = torch.rand(len(rows), longest, like.shape[-1], generator=draw) >= rate
                kept = kept[torch.from_numpy(np.isin(rows, share.line.texts)), : like.shape[1]]
                mask[start : start + len(kept), : kept.shape[1]] = kept.to(mask) / (1 - rate)
            start += count
        return mask


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
