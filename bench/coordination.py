"""What a device costs before it learns anything: messages, state written, events, commits, tables.

    python -m bench.coordination [DEVICES] [ROUNDS]

Flower, Ray, the round loop, the hosts and the run directory are the real ones; the worker writes an event and a metric
a device and does nothing else. Fixed seconds (start-up, two polls a round) show in the run with 100 devices. Seconds of
processor are those of all processes, Ray's and Flower's among them: on a busy machine they tell more than the clock.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import untether.clients.app
import untether.server.coordinator
from untether.clients.device.worker import Inputs, Outcome
from untether.sim.core.errors import ResumableStop
from untether.sim.experiment import Experiment
from untether.sim.population.source import device_id
from untether.sim.rounds.material import Material
from untether.sim.rounds.messages import Order, Reply
from untether.sim.run.directory import RunDirectory


class IdleExecutor:
    """Gives back what a pass always gives back, and learns nothing."""

    def call(self, order: Order, inputs: Inputs, **_: Any) -> Outcome:
        """An event and the columns of devices that asked, or trained, and have something to train on."""
        ids = [device_id(index) for index in order.devices]
        kind = "asked" if order.work == "fetch" else "trained"
        events = [
            {"time_s": 0.0, "event_id": f"{kind}-{i}", "device_id": i, "kind": kind, "outcome": "ok"} for i in ids
        ]
        columns = {"device": list(order.devices), "outcome": ["ok"] * len(ids), "bytes_up": [0] * len(ids)}
        if order.work == "fetch":
            columns |= {field.name: [60] * len(ids) for field in fields(Material)}
        else:
            columns |= {name: [0] * len(ids) for name in ("trained_tokens", "queries")}
        metrics = [{"device_id": i, "user_id": i, "arm": "local", "value": 0.5, "n": 1} for i in ids]
        return Outcome(Reply(columns, events), {"metrics": metrics})


untether.clients.app.make_executor = lambda told, run, context: IdleExecutor()
app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Functions of this module: Flower's processes import it to find them, and so put the idle worker to work."""
    return untether.clients.app.hello(message, context)


@app.query("fetch")
def fetch(message: Message, context: Context) -> Message:
    """The real pass on the idle worker."""
    return untether.clients.app.fetch(message, context)


@app.train()
def learn(message: Message, context: Context) -> Message:
    """The real pass on the idle worker."""
    return untether.clients.app.learn(message, context)


def cpu_s() -> float:
    """Seconds of processor that this process and its descendants, Ray's and Flower's, have taken so far."""
    total, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


class Stopwatch:
    """A progress display that keeps when each round began and ended: (seconds, seconds of processor)."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, float]] = []
        self.ended: list[tuple[float, float]] = []

    def start(self, *_: object) -> None: ...

    def update(self, *_: object) -> None: ...

    def begin(self, *_: object) -> None:
        self.begun.append((time.perf_counter(), cpu_s()))

    def end(self) -> None:
        self.ended.append((time.perf_counter(), cpu_s()))


def measure(devices: int, rounds: int) -> None:
    """One run; prints its rounds and what they come to a device."""
    import ray
    from flwr.simulation import run_simulation

    from untether.sim.launch.cluster import runtime_env

    experiment = Experiment.read(None, {
        "population.users": str(devices), "rounds": str(rounds), "cloud.provider": "world", "arms": "local",
    })  # fmt: skip
    folder = tempfile.mkdtemp(prefix="untether-bench-")
    run, watch = RunDirectory.create(Path(folder) / "run", experiment), Stopwatch()
    begun = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env())
    try:
        made = untether.server.coordinator.make_app([(run, 1)], watch, threading.Event(), [])
        run_simulation(made, app, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})
    finally:
        ray.shutdown()
    whole = time.perf_counter() - begun
    times = [end[0] - start[0] for start, end in zip(watch.begun, watch.ended, strict=True)]
    processor = [end[1] - start[1] for start, end in zip(watch.begun, watch.ended, strict=True)]
    merging = time.perf_counter()
    run.merge(experiment)
    merging = time.perf_counter() - merging
    print(
        f"{devices:6d} devices: rounds {', '.join(f'{t:.2f}' for t in times)} s; a device and round after the first: "
        f"{_each_ms(times, devices):.3f} ms, {_each_ms(processor, devices):.3f} ms of processor; tables "
        f"{1000 * merging / rounds / devices:.3f} ms; whole run {whole:.1f} s; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def _each_ms(rounds_s: list[float], devices: int) -> float:
    later = rounds_s[1:] or rounds_s
    return 1000 * sum(later) / len(later) / devices


def main() -> None:
    """Measures a small fleet, for the fixed cost, and a large one."""
    words = [int(word) for word in sys.argv[1:]]
    devices, rounds = (*words, 10_000, 3)[:2] if len(words) < 2 else words[:2]
    if len(words) == 1:
        devices, rounds = words[0], 3
    untether.server.coordinator.finish = lambda *_: None  # type: ignore[assignment]  # a report of nothing
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    for number in sorted({100, devices}):
        try:
            measure(number, rounds)
        except ResumableStop as stop:
            sys.exit(str(stop))


if __name__ == "__main__":
    from bench.coordination import main as imported  # Flower's processes import this module by its name

    imported()
