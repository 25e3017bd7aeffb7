"""Where training's time goes: one pass of the cohort engine, its operators grouped by what they are for.

python -m bench.profile [--devices 3]
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from bench.workload import Workload
from untether.clients.engine.jobs import TrainJob
from untether.clients.engine.training import train
from untether.sim.core.learning import TrainSettings

_GROUPS = {
    "dense products": ("aten::mm", "aten::addmm", "mkldnn"),
    "adapters and attention products": ("aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax",),
    "elementwise": ("aten::mul", "aten::add", "aten::silu", "aten::div", "aten::rsqrt", "aten::sum", "aten::pow"),
    "copies": ("aten::copy_", "aten::index", "aten::_embedding_bag", "aten::cat", "aten::fill_", "aten::zero_"),
    "optimizer": ("aten::_fused_adamw_",),
}


def measure(devices: int = 3, repeats: int = 10) -> dict[str, float]:
    """Microseconds a token by group; each operator's best of several runs, so that other programs hardly count."""
    workload = Workload(devices)
    base = workload.base()
    jobs = [
        TrainJob(d.index, d.job.examples, TrainSettings(steps=1), d.job.spec, d.job.seed, state=d.job.state)
        for d in workload.load(list(range(devices)))
    ]
    tokens = sum(result.tokens for result in train(base, jobs).values())
    best: dict[str, float] = {}
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            train(base, jobs)
        for event in found.key_averages():
            best[event.key] = min(best.get(event.key, float("inf")), event.self_cpu_time_total)
    groups: Counter[str] = Counter()
    for key, micros in best.items():
        group = next((name for name, signs in _GROUPS.items() if key.startswith(signs)), "everything else")
        groups[group] += micros / tokens
    return dict(groups.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=3)
    torch.set_num_threads(1)
    found = measure(parser.parse_args().devices)
    for name, micros in found.items():
        print(f"{micros:7.2f} us/token  {micros / sum(found.values()):5.1%}  {name}")


if __name__ == "__main__":
    main()
