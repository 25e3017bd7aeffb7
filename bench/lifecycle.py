"""The whole life of a device, filter, train and answer, for many devices: stock Flower, tuned peft, and untether.

    python -m bench.lifecycle [--devices 64] [--workers 2] [--dtype float32] [--device cpu] [--skip stock]

On a GPU untether and the tuned loop have one process each, and there is no stock app to compare with. Prints a table
and returns what is in it; `python -m bench` runs it among the others and writes a file.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench import cohort, stock, tuned
from bench.gemm import rates, shapes_of, training_flops
from bench.measure import STAGES, Outcome, in_processes
from bench.workload import Workload
from untether.clients.engine.training import PASS_TOKENS
from untether.sim.core import limits


def measure(workload: Workload, workers: int, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the contestants one after the other; seconds by stage, ratios, agreement, and the share of the GEMM rate."""
    outcomes: dict[str, Outcome] = {"untether": in_processes(cohort.run, workload, workers)}
    if "tuned" not in skip:
        outcomes["tuned"] = in_processes(tuned.run, workload, workers)
        if workload.device == "cpu":
            outcomes["tuned, fast products"] = in_processes(tuned.run_fast, workload, workers)
    if "stock" not in skip:
        outcomes["stock"] = stock.run(workload, workers)
    ours = outcomes["untether"]
    rows = []
    for name, outcome in outcomes.items():
        rows.append({
            "contestant": name, "wall_s": outcome.total_wall_s, "cpu_s": outcome.total_cpu_s,
            **{f"{stage}_cpu_s": outcome.cpu_s.get(stage) for stage in STAGES},
            **{f"{stage}_wall_s": outcome.wall_s.get(stage) for stage in STAGES},
            "times_untether_wall": outcome.total_wall_s / ours.total_wall_s,
            "times_untether_cpu": outcome.total_cpu_s / ours.total_cpu_s,
            **agreement(ours, outcome),
        })  # fmt: skip
    return {
        "devices": workload.devices, "workers": workers, "device": workload.device, "dtype": workload.dtype,
        "task": workload.task, "tokens": ours.tokens, "contestants": rows, "gemm": _efficiency(workload, ours),
    }  # fmt: skip


def agreement(ours: Outcome, other: Outcome) -> dict[str, float]:
    """Share of equal answers and verdicts, and the largest difference of a step's loss."""
    pairs = [(a, b) for key, found in ours.answers.items() for a, b in zip(found, other.answers[key], strict=True)]
    verdicts = [(a, b) for key, found in ours.verdicts.items() for a, b in zip(found, other.verdicts[key], strict=True)]
    losses = [abs(a - b) for key, found in ours.losses.items() for a, b in zip(found, other.losses[key], strict=False)]
    return {
        "same_answers": sum(a == b for a, b in pairs) / len(pairs),
        "same_verdicts": sum(a == b for a, b in verdicts) / len(verdicts),
        "loss_difference": max(losses),
    }


def _efficiency(workload: Workload, ours: Outcome) -> dict[str, float]:
    model = workload.plain_model()
    flops = 0.0
    for device in workload.load(list(range(workload.devices))):
        job = device.job
        rows = [(len(e.prompt_ids) + len(e.target_ids) - 1, len(e.target_ids)) for e in job.examples]
        passes = job.total_steps * job.settings.batch_size / len(rows)
        flops += passes * training_flops(model, workload.spec.rank, rows)
    on_cpu = workload.device == "cpu"
    tokens = PASS_TOKENS["cpu" if on_cpu else "cuda"]
    found = rates(sorted(set(shapes_of(model))), tokens, getattr(torch, workload.dtype), workload.device)
    achieved = flops / (ours.cpu_s if on_cpu else ours.wall_s)["train"]
    return {
        "training_flops": flops, "achieved": achieved, "plain_rate": found["plain"], "fast_rate": found["fast"],
        "share_of_plain": achieved / found["plain"], "share_of_fast": achieved / found["fast"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--workers", type=int, default=limits.cores())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--skip", nargs="*", default=[], choices=("stock", "tuned"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workload = Workload(arguments.devices, dtype=arguments.dtype, device=arguments.device)
    on_cpu = arguments.device == "cpu"
    skip = tuple(arguments.skip) if on_cpu else (*arguments.skip, "stock")
    show(measure(workload, arguments.workers if on_cpu else 1, skip))


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{found['devices']} devices, {found['workers']} processes, {found['device']}, {found['dtype']}, "
        f"{found['tokens']} tokens"
    )
    for row in found["contestants"]:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    print("  ".join(f"{key} {value:.3g}" for key, value in found["gemm"].items()))


if __name__ == "__main__":
    main()
