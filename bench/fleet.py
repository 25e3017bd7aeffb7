"""What a device costs that lives in virtual time alone, beside one that learns: real runs, one after the other.

    python -m bench.fleet [--devices 1000000] [--learners 1000] [--days 1] [--traces FOLDER] [--alone 100]

First `--alone` devices, then `--learners`, all of which learn; then `--devices`, of which `--learners` do. Prints
seconds from the start to the report, memory of all processes at its peak, and what one more device of either kind
costs. Every device has one task, asks a cloud of finite capacity once a day for eight samples, over a link that follows
a bandwidth log, and trains two adapters while it charges. Without `--traces` the logs are drawn: mobile rates, with
gaps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from untether.sim.core.seeding import generator

LOGS, PIECES = 20, 600
"""Bandwidth logs, and pieces of a second or so in each."""

FIELDS = {
    "arms": "frozen,local,collaborative", "population.tasks": "LaMP_3", "population.queries": 2,
    "cloud.samples": 8, "cloud.samples_per_request": 8, "cloud.timeout_s": 600, "network.kind": "trace",
    "network.ask_within_h": 24, "hardware.profiles": "pixel-8,galaxy-a14,iphone-13", "hardware.train_when": "charging",
    "cloud.capacity.output_tokens_per_s": 60, "cloud.capacity.queue": 100_000, "engine.memory_gib": 0.25,
}  # fmt: skip
"""A small budget for the workers: what they take beyond their models is theirs, not the fleet's."""


def draw_logs(folder: Path) -> Path:
    """Writes bandwidth logs as `network.traces` reads them: log-normal rates around 8 Mbit/s, one piece in 30 a gap."""
    folder.mkdir()
    for number in range(LOGS):
        rng = generator(1, "log", number)
        rates = rng.lognormal(9.0, 0.8, PIECES) * (rng.random(PIECES) > 1 / 30)
        pieces = [
            {"duration_ms": 1000, "bandwidth_kbps": round(float(rate)), "latency_ms": 40} for rate in rates
        ]  # fmt: skip
        (folder / f"{number:02d}.json").write_text(json.dumps(pieces))
    return folder


def run(out: Path, traces: Path, devices: int, learners: int, days: int) -> dict[str, float]:
    """Runs it and returns what it took, as the run itself says: `wall_s`, `cpu_s`, `peak_memory_bytes`."""
    fields = FIELDS | {
        "population.users": devices, "engine.learners": learners, "rounds": days, "network.traces": traces,
        "cloud.capacity.concurrency": max(1, round(devices / 5000)),
    }  # fmt: skip
    words = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    subprocess.run([sys.executable, "-m", "untether", "run", "--out", str(out), *words], check=True)
    return json.loads((out / "environment.json").read_text())["usage"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1_000_000)
    parser.add_argument("--learners", type=int, default=1000)
    parser.add_argument("--days", type=int, default=1)
    parser.add_argument("--alone", type=int, default=100)
    parser.add_argument("--traces", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        traces = told.traces.resolve() if told.traces else draw_logs(folder / "logs")
        some = run(folder / "alone", traces, told.alone, 0, told.days)
        base = run(folder / "learners", traces, told.learners, 0, told.days)
        whole = run(folder / "fleet", traces, told.devices, told.learners, told.days)
    learning_s = (base["wall_s"] - some["wall_s"]) / (told.learners - told.alone)
    virtual_s = (whole["wall_s"] - base["wall_s"]) / (told.devices - told.learners)
    for what, count, used in (("all learn", told.alone, some), ("all learn", told.learners, base),
                              (f"{told.learners:,} learn", told.devices, whole)):  # fmt: skip
        print(f"{count:>9,} devices, {what}, days {told.days}: {used['wall_s']:.0f} s, {used['cpu_s']:.0f} s of "
              f"processor, {used['peak_memory_bytes'] / 2**30:.2f} GiB at the peak")  # fmt: skip
    print(f"one more device that learns {1e3 * learning_s:.1f} ms, in virtual time alone {1e3 * virtual_s:.3f} ms: "
          f"{learning_s / virtual_s:.0f} times less")  # fmt: skip


if __name__ == "__main__":
    main()
