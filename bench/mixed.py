"""Devices that learn six tasks at once: what laying their texts out without padding is worth.

python -m bench.mixed [--devices 40] [--steps 4]

The same adapters, steps and batches, by turns: rows of texts that share their prefixes; such rows with every text
whole; and a text a row, padded, through the model's own forward pass (adapters stacked all the same).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from unittest.mock import patch

import torch

from bench.workload import Workload
from untether.clients.engine import training
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.jobs import TrainJob
from untether.clients.engine.kernels.lines import Prefixes
from untether.sim.population.world import WORLD_TASKS

REPEATS = 3


class _Whole(Prefixes):
    """Texts of which nothing may be shared."""

    def __init__(self, texts, limits):
        super().__init__(texts, [0] * len(limits))


def measure(devices: int = 40, steps: int = 4) -> dict[str, float]:
    """Seconds of processor of each way (its best of several), their ratios, and the largest difference of losses."""
    loads = [Workload(devices, task=task).load(list(range(devices))) for task in WORLD_TASKS]
    jobs: list[TrainJob] = []
    for of_device in zip(*loads, strict=True):
        first = of_device[0].job
        examples = [example for data in of_device for example in data.job.examples]
        settings = dataclasses.replace(first.settings, steps=steps)
        jobs.append(dataclasses.replace(first, examples=examples, settings=settings))
    workload = Workload(devices)
    lean = workload.base()
    own = FrozenBase(workload.plain_model(), lean.tokenizer, lean=False)
    ways = {"packed": (lean, Prefixes), "packed, whole": (lean, _Whole), "a text a row": (own, Prefixes)}
    best = dict.fromkeys(ways, float("inf"))
    losses: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):  # the first warms up
        for name, (base, prefixes) in ways.items():
            with patch.object(training, "Prefixes", prefixes):
                begun = time.process_time()
                results = training.train(base, jobs)
                spent = time.process_time() - begun
            if repeat:
                best[name] = min(best[name], spent)
            losses[name] = [loss for result in results.values() for loss in result.losses]
    tokens = sum(result.tokens for result in results.values())
    found = {"tokens": float(tokens)}
    for name, spent in best.items():
        found[f"{name}, us a token"] = spent / tokens * 1e6
        if name != "packed":
            found[f"{name}, ratio"] = spent / best["packed"]
    differences = (abs(a - b) for of in losses.values() for a, b in zip(of, losses["packed"], strict=True))
    return {**found, "largest loss difference": max(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in measure(arguments.devices, arguments.steps).items():
        print(f"{name:28} {value:.4g}")


if __name__ == "__main__":
    main()
