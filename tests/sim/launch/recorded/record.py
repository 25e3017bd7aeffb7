"""Carries out a real run and writes down what its progress was told, and when: what the test of the time left replays.

    python tests/sim/launch/recorded/record.py NAME population.users=8 rounds=2 ...

Time is processor time over cores: on a machine that has nothing else to do, that of the clock on the wall; on another,
what it would have been.
"""

import contextlib
import json
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
from rich.console import Console

from untether.sim.core import limits
from untether.sim.experiment import Experiment, key_values
from untether.sim.launch.progress import LiveProgress
from untether.sim.launch.runtime import carry_out, prepare, redirected

CHANGES_S = 0.4
"""Calls of one stage that come sooner after each other are left out."""


class ProcessorTime:
    """Seconds that this process and all that came of it have had the processor, over the cores; looked at at times."""

    def __init__(self):
        self.at, self.had = -1.0, {}

    def __call__(self) -> float:
        if time.monotonic() - self.at > 0.2:
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    used = process.cpu_times()
                    self.had[process.pid] = used.user + used.system
            self.at = time.monotonic()
        return sum(self.had.values()) / limits.cores()


class Recorder(LiveProgress):
    """A progress that keeps every call, with its time."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def _keep(self, name, *words):
        self.calls.append([round(self.elapsed_s(), 2), name, *words])

    def expect(self, guess):
        told = asdict(guess) | {name: [[*step, n] for step, n in getattr(guess, name).items()] for name in
                                ("work", "cost_s", "setup_s")}  # fmt: skip
        self._keep("expect", told)
        super().expect(guess)

    def start(self, seeds, rounds=1, rounds_done=0):
        self._keep("start", list(seeds), rounds, rounds_done)
        super().start(seeds, rounds, rounds_done)

    def begin(self, seed, round):
        self._keep("begin", seed, round)
        super().begin(seed, round)

    def update(self, stage, work, total):
        last = self.calls[-1]
        told = {name: float(f"{count:.6g}") for name, count in work.items()}
        if last[1:3] != ["update", stage] or (self.elapsed_s() - last[0] > CHANGES_S and last[3] != told):
            self._keep("update", stage, told, total)
        super().update(stage, work, total)

    def end(self):
        self._keep("end")
        super().end()


def main(name: str, *settings: str) -> None:
    experiment = Experiment.read(None, key_values(settings, "a setting"))
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(experiment, Path(folder) / "run")
        with redirected(Path(folder) / "log.txt") as terminal:
            console = Console(file=terminal, width=140, get_time=ProcessorTime())
            progress = Recorder(console=console, every_s=5.0)
            carry_out([run], progress, threading.Event())
            progress._keep("done")
    lines = "\n".join(json.dumps(call) for call in progress.calls)
    Path(__file__).with_name(f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
