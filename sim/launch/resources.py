"""What of this machine a run uses."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from untether.sim.core import limits
from untether.sim.experiment import Experiment


@dataclass(frozen=True, slots=True)
class Resources:
    """How a run uses this machine: worker processes, Flower nodes, torch threads a worker, GPUs."""

    workers: int
    hosts: int
    threads: int
    gpus: int

    @classmethod
    def of(cls, experiment: Experiment, devices: int) -> Resources:
        """Returns the resources from `[engine]`, this process's cores and the GPUs: one worker a core, or one a GPU."""
        engine, cores = experiment.engine, limits.cores()
        devices = engine.learning(devices)
        gpus = _gpus() if engine.device in ("auto", "cuda") else 0
        workers = max(1, min(engine.workers or (gpus or cores), devices))
        hosts = max(1, min(engine.hosts or workers, devices))
        return cls(workers, hosts, engine.threads or max(1, cores // workers), gpus)


def _gpus() -> int:
    """How many GPUs there are; PyTorch, which takes seconds to import, is asked only where it could find one."""
    drivers = (Path("/dev") / name for name in ("nvidiactl", "kfd", "dxg"))  # CUDA, ROCm, Windows' Linux
    if sys.platform == "linux" and not any(driver.exists() for driver in drivers):
        return 0
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
