"""The whole life of a device, filter, train and answer, for many devices: stock Flower, tuned peft, and untether.

    python -m bench.lifecycle [--devices 64] [--workers 2] [--repeats 3] [--device cpu] [--skip stock]

On a CPU untether runs in float32 and, where that is faster, in `mixed`; the tuned loop in float32 with PyTorch's
products and with untether's, and in bfloat16, its encoder in bfloat16 wherever that is faster. Agreement is with
untether in float32. On a GPU both run in bfloat16, one process each, and there is no stock app to compare with. Times
are medians of the repeats, in which contestants take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import cohort, stock, tuned
from bench.gemm import rates, shapes_of, training_flops
from bench.measure import STAGES, Outcome, in_processes
from bench.workload import Workload
from untether.clients.engine.kernels.gemm import MIXED, fastest
from untether.clients.engine.training import PASS_TOKENS
from untether.sim.core import limits


def contestants(
    devices: int, device: str, workers: int, skip: tuple[str, ...] = ()
) -> dict[str, Callable[[], Outcome]]:
    """Every contestant by name, ready to run; untether in float32 (on a GPU, bfloat16) is the first."""
    on_cpu = device == "cpu"
    if not on_cpu:
        both = Workload(devices, dtype="bfloat16", device=device)
        each = {"untether": (cohort.run, both), "tuned": (tuned.run, both)}
    else:
        narrow = fastest(device) == MIXED
        plain = Workload(devices)
        best = replace(plain, encoder="bfloat16" if narrow else "float32")
        each = {"untether": (cohort.run, plain)}
        if narrow:
            each["untether, mixed"] = cohort.run, replace(best, dtype=MIXED)
        each["tuned"] = tuned.run, best
        each["tuned, fast products"] = tuned.run_fast, best
        if narrow:
            each["tuned, bfloat16"] = tuned.run, replace(best, dtype="bfloat16")
    found = {
        name: partial(in_processes, run, workload, workers if on_cpu else 1)
        for name, (run, workload) in each.items() if not ("tuned" in skip and name.startswith("tuned"))
    }  # fmt: skip
    if on_cpu and "stock" not in skip:
        found["stock"] = partial(stock.run, Workload(devices), workers)
    return found


def measure(
    devices: int = 64, device: str = "cpu", workers: int = 1, repeats: int = 3, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Medians of the contestants' seconds by stage, ratios, agreement, and the share of the GEMM rate."""
    everyone = contestants(devices, device, workers, skip)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in everyone}
    for turn in range(repeats):
        for name, run in everyone.items():
            if turn and name == "stock":
                continue  # once: it is minutes long, and nowhere near
            outcomes[name].append(run())
            print(f"turn {turn + 1}: {name} {outcomes[name][-1].total_wall_s:.1f} s", flush=True)
    ours, rows = outcomes["untether"], []
    for name, runs in outcomes.items():
        rows.append({
            "contestant": name, "wall_s": median(run.total_wall_s for run in runs),
            "cpu_s": median(run.total_cpu_s for run in runs),
            **{f"{stage}_cpu_s": median(run.cpu_s[stage] for run in runs) for stage in STAGES},
            **agreement(ours[0], runs[0]),
        })  # fmt: skip
    fewest = {side: min((row["wall_s"] for row in rows if row["contestant"].startswith(side)), default=None)
              for side in ("untether", "tuned")}  # fmt: skip
    dtype = "float32" if device == "cpu" else "bfloat16"
    efficiency = _efficiency(Workload(devices, dtype=dtype, device=device), ours[0])
    return {
        "devices": devices, "workers": workers, "device": device, "repeats": repeats, "tokens": ours[0].tokens,
        "contestants": rows, "best_of_each": fewest["tuned"] / fewest["untether"] if fewest["tuned"] else None,
        "gemm": efficiency,
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--skip", nargs="*", default=[], choices=("stock", "tuned"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    show(measure(arguments.devices, arguments.device, arguments.workers, arguments.repeats, tuple(arguments.skip)))


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{found['devices']} devices, {found['workers']} processes, {found['device']}, {found['tokens']} tokens")
    for row in found["contestants"]:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    if found["best_of_each"]:
        print(f"the better tuned loop takes {found['best_of_each']:.2f} times as long, each in its best dtype")
    print("  ".join(f"{key} {value:.3g}" for key, value in found["gemm"].items()))


if __name__ == "__main__":
    main()
