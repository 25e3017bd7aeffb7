"""How much memory and disk a fleet takes: a real `untether run`, its whole family of processes watched.

    python -m bench.memory [--devices 10000] [--rounds 1] [--set KEY=VALUE ...]

Memory is the sum over all processes of what each has for itself plus its share of what is shared (PSS). With many
rounds it prints the peak of every fifth, which is flat after the first ten if nothing leaks.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

GIB = 2**30


def family_bytes(root: psutil.Process) -> tuple[int, dict[str, int]]:
    """(bytes of a process and all its descendants, bytes of the workers by process id)."""
    whole, workers = 0, {}
    for process in [root, *root.children(recursive=True)]:
        try:
            taken = process.memory_full_info().pss
            if " ".join(process.cmdline()).startswith("ray::Worker"):
                workers[str(process.pid)] = taken
        except psutil.Error:
            continue
        whole += taken
    return whole, workers


def folder_bytes(path: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure(devices: int, rounds: int, more: list[str]) -> None:
    """One run; prints the peak over all processes, by round, and what a device costs."""
    path = Path(tempfile.mkdtemp(prefix="untether-bench-")) / "run"
    fields = {
        "population.users": devices, "rounds": rounds, "population.tasks": "LaMP_4", "population.queries": 1,
        "arms": "local", "training.steps": 2, "training.batch_size": 4, "generation.max_new_tokens": 4,
        "evaluation.resamples": 100,
    }  # fmt: skip
    words = [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
    words += [word for pair in more for word in ("--set", pair)]
    begun = time.perf_counter()
    command = [sys.executable, "-m", "sim.cli", "run", "--out", str(path), *words]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    root, peak, worker_peak = psutil.Process(run.pid), 0, {}
    disk = 0
    while run.poll() is None:
        try:
            whole, workers = family_bytes(root)
        except psutil.NoSuchProcess:
            break
        peak = max(peak, whole)
        done = len(list((path / "state" / "commits").glob("*.json")))
        worker_peak[done] = max(worker_peak.get(done, 0), sum(workers.values()))
        disk = max(disk, folder_bytes(path / "adapters"))
        time.sleep(0.5)
    said = run.communicate()[0]
    if run.returncode:
        sys.exit(said)
    for done in sorted(worker_peak):
        if done % 5 == 0 and rounds > 1:
            print(f"round {done:3d}: workers {worker_peak[done] / GIB:.3f} GiB")
    print(
        f"{devices} devices, {rounds} rounds: peak {peak / GIB:.2f} GiB over all processes; adapters at most "
        f"{disk / devices / 1024:.1f} KiB a device on disk; run directory {folder_bytes(path) / 2**20:.1f} MiB; "
        f"{time.perf_counter() - begun:.0f} s; load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    measure(options.devices, options.rounds, options.set)


if __name__ == "__main__":
    main()
