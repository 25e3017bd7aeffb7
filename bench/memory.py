"""How much memory and disk a fleet takes: a real `untether run`, its whole family of processes watched.

    python -m bench.memory [--devices 10000] [--rounds 1] [--set KEY=VALUE ...]

Memory is the sum over all processes, Ray's and Flower's among them, of what each has for itself plus its share of what
is shared (PSS), looked at twice a second. With many rounds it prints the peak of every fifth, and by how much a round
raises it after the first ten: nothing, if nothing leaks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

MIB, GIB = 2**20, 2**30
WARM_UP = 10
"""Rounds after which memory should be flat."""


@dataclass
class Seen:
    """Most bytes of memory seen while so many rounds were committed, the least of the workers, those of `state/`."""

    whole: int = 0
    workers: int = 0
    least: int = 1 << 62
    state: int = 0


def family_bytes(root: psutil.Process) -> tuple[int, int]:
    """(bytes of a process and all its descendants, bytes of the workers among them)."""
    whole = workers = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            taken = process.memory_full_info().pss
            workers += taken if " ".join(process.cmdline()).startswith("ray::Worker") else 0
        except psutil.Error:
            continue
        whole += taken
    return whole, workers


def folder_bytes(path: Path) -> int:
    """Bytes of all files under a folder; files and folders may go meanwhile."""
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(folder, file))
    return total


def slope(values: Sequence[int]) -> float:
    """Bytes a round, by least squares."""
    return float(np.polyfit(range(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


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
    command = [sys.executable, "-m", "untether", "run", "--out", str(path), *words]
    begun, at_work_s, learned_s = time.perf_counter(), 0.0, 0.0
    seen: dict[int, Seen] = {}
    disk = 0
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        root = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                whole, workers = family_bytes(root)
            except psutil.NoSuchProcess:
                break
            done, now_s = len(list((path / "state" / "commits").glob("*.json"))), time.perf_counter() - begun
            at_work_s = at_work_s or (now_s if workers else 0.0)
            learned_s = now_s if done < rounds else learned_s
            here = seen.setdefault(done, Seen())
            here.whole, here.workers = max(here.whole, whole), max(here.workers, workers)
            here.least = min(here.least, workers)
            here.state = folder_bytes(path / "state")
            disk = max(disk, folder_bytes(path / "adapters"))
            time.sleep(0.5)
        if run.wait():
            output.seek(0)
            sys.exit(output.read())
    whole_s = time.perf_counter() - begun
    later = [seen[done] for done in sorted(seen) if WARM_UP <= done < rounds]
    for done in sorted(seen):
        if done % 5 == 0 and rounds > 1:
            here = seen[done]
            print(
                f"{done:3d} rounds committed: all {here.whole / MIB:.0f} MiB, workers {here.workers / MIB:.0f} MiB "
                f"(least {here.least / MIB:.0f}), state {here.state / MIB:.2f} MiB"
            )
    if len(later) > 1:
        print(
            f"from round {WARM_UP} on, a round adds: all {slope([one.whole for one in later]) / MIB:+.2f} MiB, workers "
            f"{slope([one.workers for one in later]) / MIB:+.2f} MiB, state "
            f"{slope([one.state for one in later]) / 1024:+.1f} KiB"
        )
    print(
        f"{devices} devices, {rounds} rounds: peak {max(one.whole for one in seen.values()) / GIB:.2f} GiB over all "
        f"processes, {max(one.workers for one in seen.values()) / GIB:.2f} GiB of it workers; adapters at most "
        f"{disk / devices / 1024:.1f} KiB a device on disk; run directory {folder_bytes(path) / MIB:.1f} MiB; "
        f"{whole_s:.0f} s: {at_work_s:.0f} until workers were there, "
        f"{1000 * (learned_s - at_work_s) / rounds / devices:.1f} ms a device and round, {whole_s - learned_s:.0f} "
        f"for tables and report; load {os.getloadavg()[0]:.1f}"
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
