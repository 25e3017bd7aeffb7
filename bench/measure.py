"""Running a contestant: one process a core, one thread each, seconds by stage, everything it learned and answered."""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.workload import Workload

STAGES = ("train", "decode", "embed")


@dataclass
class Outcome:
    """What a process took (wall and CPU seconds by stage), learned (losses) and answered, and what its filter said."""

    wall_s: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    answers: dict[int, list[list[int]]] = field(default_factory=dict)
    verdicts: dict[int, list[str]] = field(default_factory=dict)
    tokens: int = 0

    @contextmanager
    def stage(self, name: str):
        """Adds to a stage's seconds, a GPU's work included."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        synchronize()
        self.wall_s[name] = self.wall_s.get(name, 0.0) + time.perf_counter() - wall
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - cpu

    def join(self, other: Outcome) -> None:
        """Another process's share of the work, done at the same time: walls overlap, CPU seconds add up."""
        for stage, seconds in other.wall_s.items():
            self.wall_s[stage] = max(self.wall_s.get(stage, 0.0), seconds)
        for stage, seconds in other.cpu_s.items():
            self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + seconds
        self.losses |= other.losses
        self.answers |= other.answers
        self.verdicts |= other.verdicts
        self.tokens += other.tokens

    @property
    def total_wall_s(self) -> float:
        return sum(self.wall_s.values())

    @property
    def total_cpu_s(self) -> float:
        return sum(self.cpu_s.values())


def synchronize() -> None:
    """Wait until a GPU has done what it was told."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


Contestant = Callable[[Workload, Sequence[int]], Outcome]


def in_processes(contestant: Contestant, workload: Workload, workers: int) -> Outcome:
    """Split the devices over processes; each loads its models before the clock starts."""
    shares = [list(range(worker, workload.devices, workers)) for worker in range(workers)]
    whole = Outcome()
    with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"), initializer=_one_thread) as pool:
        for part in pool.map(contestant, [workload] * workers, shares):
            whole.join(part)
    return whole


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
