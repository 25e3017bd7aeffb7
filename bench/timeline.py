"""How fast the timeline alone is: 10,000 devices x 30 rounds with on/off links and a finite cloud, on one core.

    python -m bench.timeline [--devices 10000] [--rounds 30]

Links have 20-minute spells; the cloud serves 64 requests at once. Prints seconds, peak memory and what became of the
requests. Every round is planned and scheduled, with two adapters a device to train; no answer has the size that was
expected of it. Memory must not grow with the rounds: its peak after a third of them is printed beside that at the end.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter

from untether.sim.experiment import Experiment
from untether.sim.rounds.garbage import uncollected
from untether.sim.time.asking import Ask, Size
from untether.sim.time.timeline import Timeline, VirtualWork


def experiment() -> Experiment:
    """On/off links with 20-minute spells, a finite cloud, phones of three kinds."""
    return Experiment.model_validate({
        "network": {"kind": "onoff", "mean_up_s": 1200, "mean_down_s": 1200},
        "cloud": {"capacity": {
            "concurrency": 64, "prompt_tokens_per_s": 5000, "output_tokens_per_s": 60, "requests_per_minute": 3000,
        }},
        "hardware": {"profiles": ["pixel-8", "galaxy-a14", "iphone-13"], "train_when": "charging"},
    })  # fmt: skip


def run(devices: int, rounds: int, seed: int = 1) -> tuple[Counter[str], list[float]]:
    """Plans and schedules every round; returns how often each outcome came, and the peak memory after each (MiB)."""
    timeline = Timeline(experiment(), seed, "d{:05d}".format)
    outcomes: Counter[str] = Counter()
    peaks_mib = []
    for round in range(rounds):
        size = timeline.expected()
        asks = [Ask(f"s{seed}-r{round}-{device}", device, size) for device in range(devices)]
        plan = timeline.plan(round, asks)
        granted = plan.granted
        sizes = {
            ask.request_id: Size(4200, 2000 + ask.device % 400, 1000, 450 + ask.device % 100)
            for ask in asks
            if ask.request_id in granted
        }
        works = [
            VirtualWork(device, arm, 24, 20_000, needs, 12, 10_000)
            for device in range(devices)
            for arm, needs in (("local", ()), ("collaborative", (f"s{seed}-r{round}-{device}",)))
        ]
        schedule = timeline.schedule(plan, sizes, works)
        outcomes.update(final.outcome for final in schedule.finals.values())
        outcomes.update(f"trained on {v.on}: {v.outcome}" for v in schedule.versions)
        timeline.advance(schedule)
        peaks_mib.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return outcomes, peaks_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with uncollected():  # as a run does
        outcomes, peaks_mib = run(arguments.devices, arguments.rounds)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    third_mib, end_mib = peaks_mib[(len(peaks_mib) - 1) // 3], peaks_mib[-1]
    print(f"{arguments.devices} devices x {arguments.rounds} rounds: {wall_s:.1f} s ({cpu_s:.1f} s of CPU)")
    print(f"peak memory: {third_mib:.0f} MiB after a third of the rounds, {end_mib:.0f} MiB at the end")
    for outcome, count in outcomes.most_common():
        print(f"{count:10d}  {outcome}")


if __name__ == "__main__":
    main()
