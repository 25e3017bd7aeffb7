"""Training of many private adapters together on one frozen base.

Every job keeps its own batches, loss mean, clipping, learning rate, step count and optimizer history; what jobs share
is the pass through the base. At each turn the jobs in memory take one step. A job's batch becomes a row of texts, their
common prefixes computed once (`clients.engine.kernels.packing`). The rows of all jobs, sorted by width, are cut into
passes of a bounded number of tokens (few enough for the processor's caches); each pass runs forward and backward once,
and its adapters step. A finished job leaves and a waiting one takes its place. Only floating-point rounding depends on
which jobs are trained together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.encoding import truncate_prompt
from untether.clients.engine.jobs import Example, Trainable, TrainJob, batch_plan
from untether.clients.engine.kernels.attention import TokenLosses
from untether.clients.engine.kernels.gemm import fast_products
from untether.clients.engine.kernels.lines import Line, Prefixes, fill
from untether.clients.engine.kernels.optimizer import CohortAdamW, OptimizerStep
from untether.clients.engine.kernels.packing import pack, pad
from untether.clients.engine.lora_layers import Route
from untether.clients.engine.memory import (
    activation_bytes_per_token,
    budget_bytes,
    give_back,
    is_out_of_memory,
    keep_heap,
)
from untether.sim.core.seeding import derive

__all__ = ["Example", "TrainJob", "TrainResult", "Trainable", "batch_plan", "train"]

PASS_TOKENS = {"cpu": 2048, "cuda": 131072}
"""Padded tokens of one forward and backward pass: on a CPU its activations should stay near the caches."""
COHORT = {"cpu": 32}
"""Adapters that train side by side where nobody says how many: enough to fill passes of the shortest texts. The others
wait, and take no memory."""
_PASS_OVERHEAD = {"cpu": 256, "cuda": 65536}
"""Tokens that could be trained in the time that a pass costs whatever its size: batches of different widths share a
pass only if that pads less."""
_ROUND_TARGETS = 64
"""The places of a pass that the head sees are filled up to a multiple: a product of a new shape is compiled first."""


@dataclass
class TrainResult:
    """The result of a job.

    Args:
        state: The adapter under PEFT's keys.
        losses, learning_rates, tokens_by_step: Of each step; tokens without padding.
        outcome: `ok`, or `out_of_memory` where even one example of the job did not fit (the state is the last one).
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
    """Trains all jobs.

    A pass that runs out of memory is split and repeated; the bound then stays lower.

    Args:
        base: The frozen base model.
        jobs: The jobs; their keys differ.
        memory_bytes: Budget for adapters and activations; by default `budget_bytes`.
        max_cohort: Most adapters in memory at once; None: `COHORT`, or all on a GPU.
        pass_tokens: Padded tokens of a pass.
        progress: Called with (steps done, steps in all) after every turn.

    Returns:
        The results by the jobs' keys, in the order of the jobs.
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
    prefixes: Prefixes | None
    """How the examples begin alike, where the base can make use of it."""
    result: TrainResult
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    moving: Tensor | None = None
    """Which weights are trained, [size], bool; None: all."""
    start: Tensor | None = None
    """The weights at the beginning, [size], where a proximal term holds on to them."""
    missing: int = 0
    """Texts of the next batch that no pass has seen yet."""
    loss: Tensor | None = None
    grad: Tensor | None = None

    def batch(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input ids, target ids) of the next batch; the last target is never an input."""
        return [self.examples[index] for index in self.plan[self.step]]

    def shares(self, most: int) -> list[_Share]:
        """The next batch, in shares of at most so many tokens (or one text)."""
        chosen = self.plan[self.step]
        self.missing, self.loss, self.grad = len(chosen), None, None
        if self.prefixes is not None:
            lines = self.prefixes.lines(chosen)
        else:
            lines = [Line((place,), 0, (len(ids),)) for place, (ids, _) in enumerate(self.batch())]
        return [_Share(self, row) for row in fill(lines, most)]


@dataclass(eq=False, slots=True)
class _Share:
    """Lines of a run's next batch, mostly all: a row if the base can pack them, else a row each."""

    run: _Run
    lines: list[Line]

    def places(self) -> list[int]:
        """Which texts of the batch, in the order of the lines."""
        return [place for line in self.lines for place in line.texts]

    def texts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input ids, target ids) of the lines' texts."""
        batch = self.run.batch()
        return [batch[place] for place in self.places()]

    def shape(self) -> tuple[int, int]:
        """(rows, their width in tokens)"""
        tokens = [line.tokens for line in self.lines]
        return (1, sum(tokens)) if self.run.prefixes is not None else (len(tokens), max(tokens))

    def halves(self) -> list[_Share]:
        """The same texts in two shares; nothing if there is only one."""
        lines = self.lines if len(self.lines) > 1 or len(self.lines[0].texts) == 1 else self.lines[0].halves()
        middle = len(lines) // 2
        return [_Share(self.run, list(part)) for part in (lines[:middle], lines[middle:])] if middle else []


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
            self.capacity = min(len(waiting), room, max_cohort or COHORT.get(base.device.type, len(waiting)))

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
            for shares in self._passes([share for run in self.runs for share in run.shares(self.pass_tokens)]):
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
        prefixes = None
        if self.base.lean is not None:  # a model with its own forward pass knows no packing
            # Dropout strikes each text's beginning on its own.
            shared = [len(ids) - len(target) if not job.spec.dropout else 0 for ids, target in rows]
            prefixes = Prefixes([ids.tolist() for ids, _ in rows], shared)
        moving = None if job.trainable is None else self.stack.moving(slot, job.trainable)
        start = self.stack.flat[slot].clone() if job.proximal_mu else None
        return _Run(job, rows, batch_plan(job), slot, prefixes, TrainResult({}), moving=moving, start=start)

    def _finish(self, run: _Run) -> None:
        run.result.state = self.stack.state(run.slot)
        run.result.losses = torch.stack(run.losses).tolist() if run.losses else []
        self.results[run.job.key] = run.result
        self.done += run.job.total_steps

    def _passes(self, shares: list[_Share]) -> list[list[_Share]]:
        """Shares of like width together, as many as fit into a pass."""
        overhead = _PASS_OVERHEAD.get(self.base.device.type, 4096)
        passes: list[list[_Share]] = []
        rows = width = 0
        shapes = [(share.shape(), share) for share in shares]
        for (more, wide), share in sorted(shapes, key=lambda pair: (pair[0][1], pair[1].run.slot)):
            joint = (rows + more) * max(width, wide)
            if passes and joint <= min(self.pass_tokens, rows * width + more * wide + overhead):
                passes[-1].append(share)
                rows, width = rows + more, max(width, wide)
            else:
                passes.append([share])
                rows, width = more, wide
        return passes

    def _advance(self, shares: list[_Share]) -> None:
        """Take shares through the base, and step the runs whose batch is complete; in halves if memory runs out."""
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
            # Half of what did not fit, and not of the bound: parts of one pass may fail, too, one after the other.
            self.pass_tokens = min(self.pass_tokens, max(1, _padded_tokens(shares) // 2))
            self._advance(shares[: len(shares) // 2])
            self._advance(shares[len(shares) // 2 :])
        elif halves := shares[0].halves():
            for share in halves:
                self._advance([share])
        else:
            shares[0].run.result.outcome = "out_of_memory"

    def _gradients(self, shares: list[_Share]) -> tuple[Tensor, Tensor]:
        """What shares add to their batch's mean loss, [shares], and to its gradient, [shares, size]."""
        device = self.base.device
        texts = [share.texts() for share in shares]
        own_ids = [[ids for ids, _ in of_share] for of_share in texts]
        if self.base.lean is not None:
            split = self.base.lean.splits(max(len(ids) for of_share in own_ids for ids in of_share))
            ids, tokens, packing = pack([share.lines for share in shares], own_ids, device, split)
            counts, inputs = [1] * len(shares), {"packing": packing}
        else:
            ids, tokens = pad([ids for of_share in own_ids for ids in of_share])
            counts, inputs = [len(of_share) for of_share in texts], {}
        owners = [index for index, of_share in enumerate(texts) for _, target in of_share for _ in target]
        all_targets = [target for of_share in texts for _, target in of_share]
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
        dropout = _Dropout(shares, tokens) if any(share.run.job.spec.dropout for share in shares) else None
        route = self.stack.route(slots, counts, len(ids), flat, grads, dropout)
        with self.stack.active(route):
            logits = self.base.logits_at(places, torch.from_numpy(ids).to(device), use_cache=False, **inputs)
            losses = TokenLosses.apply(logits, targets.to(device), weight_at)
            losses.sum().backward()
        return torch.zeros_like(weight).index_add_(0, owner, losses.detach()), grads

    def _step(self, runs: list[_Run]) -> None:
        if not runs:
            return
        updates, flat = [], self.stack.flat
        for run in runs:
            assert run.grad is not None
            if run.start is not None:
                run.grad = run.grad.add(flat[run.slot] - run.start, alpha=run.job.proximal_mu)
            if run.moving is not None:
                run.grad = run.grad * run.moving
        kept = {run.slot: flat[run.slot].clone() for run in runs if run.moving is not None}
        for run in runs:
            s = run.job.settings
            rate = s.rate_at(run.step, len(run.plan))
            updates.append(OptimizerStep(run.slot, run.step, rate, s.weight_decay, s.max_grad_norm, s.betas, s.eps))
        self.optimizer.step(updates, [run.grad for run in runs])
        for run in runs:
            if run.moving is not None:  # weight decay moves what has no gradient, too
                flat[run.slot] = torch.where(run.moving, flat[run.slot], kept[run.slot])
        for run, update in zip(runs, updates, strict=True):
            run.losses.append(run.loss)
            run.result.learning_rates.append(update.learning_rate)
            run.result.tokens_by_step.append(sum(len(ids) for ids, _ in run.batch()))
            run.step, run.grad = run.step + 1, None


def _padded_tokens(shares: list[_Share]) -> int:
    """The tokens of a pass of these shares, padding included."""
    shapes = [share.shape() for share in shares]
    return sum(rows for rows, _ in shapes) * max(width for _, width in shapes)


def _complete(shares: list[_Share], losses: Tensor, grads: Tensor) -> list[_Run]:
    """Hand shares' losses and gradients to their runs; the runs whose batch is complete with them."""
    for share, loss, grad in zip(shares, losses.unbind(), grads.unbind(), strict=True):
        run = share.run
        run.missing -= len(share.places())
        run.loss = loss if run.loss is None else run.loss + loss
        run.grad = grad if run.grad is None else run.grad.add_(grad)
    runs = list(dict.fromkeys(share.run for share in shares))
    for run in runs:
        if run.missing and run.grad is not None:
            run.grad = run.grad.clone()  # a view would keep the gradients of the whole pass
    return [run for run in runs if not run.missing]


class _Dropout:
    """Inverted dropout masks that depend on (job, step, layer) and the job's own batch, not on who shares the pass."""

    def __init__(self, shares: Sequence[_Share], tokens: Sequence[np.ndarray]):
        """tokens: the flattened places of each text's tokens in the pass."""
        self._shares, self._tokens = shares, tokens

    def __call__(self, name: str, route: Route, like: Tensor) -> Tensor:
        """like: [rows, tokens, width] of the pass, or [targets, 1, width] where only those are left."""
        mask = torch.ones_like(like).flatten(0, 1)
        whole, at, tokens = like.shape[1] > 1, 0, iter(self._tokens)
        for share in self._shares:
            run, batch, rate = share.run, share.run.batch(), share.run.job.spec.dropout
            longest = max(len(ids) for ids, _ in batch) if whole else 1
            owner = np.repeat(np.arange(len(batch)), [1 if whole else len(target) for _, target in batch])
            if rate:
                draw = torch.Generator().manual_seed(derive(run.job.seed, "dropout", run.step, name))
                kept = (torch.rand(len(owner), longest, like.shape[-1], generator=draw) >= rate).to(mask) / (1 - rate)
            for place in share.places():
                own, count = next(tokens), int((owner == place).sum())
                if rate:
                    of_text = kept[torch.from_numpy(owner == place)].flatten(0, 1)
                    mask[own if whole else slice(at, at + count)] = of_text[: len(own) if whole else count]
                at += count
        return mask.view(like.shape)


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
