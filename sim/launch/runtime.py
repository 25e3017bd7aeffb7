"""Runs an Experiment: on Flower's simulation runtime (Ray) in this process, or inside `flwr run`.

Flower and Ray print a lot, some of it from C++. During a run, file descriptors 1 and 2 go to `log.txt` in the run
directory, and the run's own lines to a duplicate of the terminal's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil

from untether.sim.core.clock import WallClock
from untether.sim.core.errors import Failure, ResumableStop, UserError, disk_is_full
from untether.sim.experiment import Experiment
from untether.sim.experiment.endpoint import without_credentials
from untether.sim.experiment.plugins import fingerprints
from untether.sim.launch.arithmetic import settled
from untether.sim.launch.cluster import join_cluster, start_here
from untether.sim.launch.estimate import expected_work, guess_of
from untether.sim.launch.progress import LiveProgress, Voice
from untether.sim.launch.resources import Resources
from untether.sim.launch.speed import speed_of
from untether.sim.launch.time_left import Guess
from untether.sim.population.source import open_population
from untether.sim.rounds.planner import Rounds
from untether.sim.run.directory import RunDirectory
from untether.sim.run.environment import describe
from untether.sim.run.lock import RunLock

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that stop a run resumably: Ctrl-C, a batch system's, a terminal that is closed."""
_HANDLERS: list[Callable[[int, Any], None]] = []

GRACE_S = 6.0
"""How long an interrupted run may take to end by itself."""


def prepare(experiment: Experiment, out: Path | None) -> RunDirectory:
    """Checks whatever can be checked before anything heavy starts, then creates the run directory.

    Raises:
        UserError: A strategy or task is unknown, data or a key is missing, or `out` holds a run.
    """
    check(experiment)
    experiment = settled(experiment)
    path = out or next_run_directory(experiment.name)
    run = RunDirectory.create(path, experiment)
    run.write_json("environment.json", describe(experiment))
    return run


def reopen(path: Path, experiment: Experiment | None = None) -> RunDirectory:
    """Opens the run directory of a stopped run, to resume it.

    Args:
        path: The run directory.
        experiment: The expected experiment; None: whatever it holds. It may differ in `[engine]`, which then replaces
            the old one.

    Raises:
        UserError: Anything else differs (the message names it), the version is another, or data or a key is missing.
    """
    run = RunDirectory.open(path)
    experiment = experiment and settled(experiment, run.experiment)
    run.check_resumable(experiment)
    run.check_state()
    if experiment is not None:
        run.take_over(experiment)
    check(run.experiment)
    try:
        environment = run.read_json("environment.json") or {}
    except UserError:  # what can be made again is made again
        environment = {}
    environment = environment or describe(run.experiment)
    now = fingerprints(run.experiment.plugins)
    changed = [name for name, digest in environment.get("plugins", {}).items() if now.get(name) != digest]
    if changed:
        raise UserError(
            f"plugins: {', '.join(changed)}: not what the run began with. Put it back, or start anew with --out"
        )
    resumed = [*environment.get("resumed", []), WallClock().timestamp()]
    run.write_json("environment.json", {**environment, "resumed": resumed})
    return run


def check(experiment: Experiment) -> None:
    """Checks whatever would stop the run later: strategy, generator, key, tasks, data.

    Raises:
        UserError: Something is wrong.
    """
    from untether.clients.filters import create_filters
    from untether.server.cloud import check_cloud

    create_filters(experiment.filters, experiment.settings)
    check_cloud(experiment)
    check_model(experiment.model.base)
    kept = Path(experiment.engine.cache).expanduser()
    if experiment.engine.cache and kept.exists() and not kept.is_dir():
        raise UserError(f"engine.cache = `{kept}`: this is no folder. Give one, or a name for a new one")
    for seed in experiment.seeds:
        population = open_population(experiment, seed)
        if len(population) == 0:
            raise UserError(f"the population of seed {seed} is empty: no user has enough history and a query")
        population.asked(0)
        Rounds(experiment, seed, population)  # profiles, models, traces, policy


def check_model(base: str) -> None:
    """Checks that a model of the catalogue is fetched, that a path given as `model.base` exists, and that a GGUF file
    is one that converts; a hub name is looked up when the model loads.
    """
    from untether.clients.base_model import resolve

    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1
    if looks_local and not base.endswith(".gguf") and not Path(base).expanduser().is_dir():
        raise UserError(
            f"model.base = `{base}`: no such folder. Give `embedded`, a name of `untether model list`, a hub name, a "
            "checkpoint's folder or a GGUF file"
        )
    resolve(base)


def next_run_directory(name: str) -> Path:
    """Returns `runs/<name>`, or the first of `runs/<name>-2`, `-3`, ... that is free."""
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def launch(
    *runs: RunDirectory, terminal: TextIO | None = None, ray_address: str = "", again: str = "", voice: Voice = "lines"
) -> None:  # fmt: skip
    """Runs the uncommitted rounds of run directories, one after the other, and writes the report of each as it ends.

    All use one Flower simulation runtime.

    Args:
        runs: The run directories.
        terminal: Where progress goes: what `redirected` yields.
        ray_address: A Ray cluster to join (`auto`: the one of this machine); empty: Ray is started here and ends with
            the last run.
        again: The command that resumes after a stop, for messages.
        voice: How progress speaks.

    Raises:
        UserError: A mistake in the experiment or the input. With several runs, messages name the run.
        ResumableStop: A stop, by Ctrl-C, SIGTERM or a full disk among others.
        Failure: A defect, with its traceback.
    """
    stop, again = threading.Event(), again or f"untether run --resume {runs[0].path}"
    with stopping(stop, farewell(again, terminal)), LiveProgress(file=terminal, voice=voice) as progress:
        carry_out(runs, progress, stop, ray_address)


def carry_out(
    runs: Sequence[RunDirectory], progress: LiveProgress, stop: threading.Event, ray_address: str = ""
) -> None:
    """Runs as `launch` does, with a progress and signals of the caller's; ends soon after `stop` is set, resumably."""
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.enter_context(RunLock(run.path))
            if run.finished:
                run.drop_parts()
        if all(run.finished for run in runs):
            return
        try:
            _simulate(runs, progress, stop, ray_address)
        except KeyboardInterrupt:
            raise ResumableStop("interrupted") from None
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise ResumableStop(f"a disk is full ({error}). Free some space, then resume the run.") from error


def _simulate(runs: Sequence[RunDirectory], progress: LiveProgress, stop: threading.Event, ray_address: str) -> None:
    os.environ.update({
        "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false", "RAY_DEDUP_LOGS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_worker_niceness": "0",  # its default of 15 starves the workers on a machine with anything else to do
    })
    for line in dict.fromkeys(key_goes_to(run.experiment) for run in runs):
        if line:
            progress.note(line)
    progress.note("starting Flower and Ray ...")
    import ray
    from flwr.simulation import run_simulation

    from untether.clients.app import app as client_app
    from untether.server.coordinator import make_app

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    waiting = [run for run in runs if not run.finished]
    devices = [len(open_population(run.experiment, run.experiment.seeds[0])) for run in waiting]
    layouts = [Resources.of(run.experiment, count) for run, count in zip(waiting, devices, strict=True)]
    turns = _Turns(runs, {run: layout.threads for run, layout in zip(waiting, layouts, strict=True)}, progress)
    workers, hosts, gpus = (max(getattr(layout, name) for layout in layouts) for name in ("workers", "hosts", "gpus"))
    _check_stop(stop)
    if ray_address:
        workers = join_cluster(ray_address)
        wanted = [run.experiment.engine.hosts or workers for run in waiting]
        hosts = max(min(pair) for pair in zip(wanted, devices, strict=True))
    else:
        start_here(hosts, gpus, workers)
    renew_signals()  # Ray has put a handler of its own in their place, which ends the process at once
    healing = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1}  # a dead actor comes back; `exchange` asks again
    failed: list[BaseException] = []
    try:
        _check_stop(stop)
        run_simulation(
            make_app(turns, progress, stop, failed), client_app, num_supernodes=hosts,
            backend_config={"client_resources": healing},
        )
        if failed:
            raise failed[0]
    except (UserError, ResumableStop, Failure) as error:
        if len(runs) > 1 and turns.now is not None:
            raise type(error)(f"{turns.now.path.name}: {error}") from error
        raise
    finally:
        ray.shutdown()


def key_goes_to(experiment: Experiment) -> str:
    """Returns which variable's value a run shows to which host; empty for one that asks nobody, or without a key."""
    cloud = experiment.cloud
    if cloud.provider != "openai" or not os.environ.get(cloud.api_key_env):
        return ""
    host = without_credentials(cloud.base_url)
    return f"the key in {cloud.api_key_env} (cloud.api_key_env) goes to {host}, and to no other host"


class _Turns:
    """The runs that wait, one after the other as they are asked for, each with its threads a worker."""

    def __init__(self, runs: Sequence[RunDirectory], threads: Mapping[RunDirectory, int], progress: LiveProgress):
        self.runs, self.threads, self.progress = runs, threads, progress
        self.now: RunDirectory | None = None

    def __iter__(self) -> Iterator[tuple[RunDirectory, int]]:
        work = [_work(run.experiment) if run in self.threads else 0 for run in self.runs]
        for place, run in enumerate(self.runs):
            if run not in self.threads:
                continue
            self.now = run
            if len(self.runs) > 1:
                self.progress.cell(place + 1, len(self.runs), run.path.name, work[place], sum(work[place + 1 :]))
            self.progress.expect(self._guess(run.experiment))
            if run.read_json("environment.json") is None:
                run.write_json("environment.json", describe(run.experiment))
            yield run, self.threads[run]

    def _guess(self, experiment: Experiment) -> Guess:
        population = open_population(experiment, experiment.seeds[0])
        speed, workers = speed_of(experiment), Resources.of(experiment, len(population)).workers
        return guess_of(experiment, expected_work(experiment, population, speed.chars_per_token)[0], speed, workers)


def _work(experiment: Experiment) -> float:
    """How much a run has to do, in no unit: for the time that is left. A device in virtual time alone costs little."""
    users = experiment.population.users
    learning = experiment.engine.learning(users)
    return len(experiment.seeds) * experiment.rounds * len(experiment.arms) * (learning + (users - learning) / 500)


def _check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise ResumableStop("interrupted")


def farewell(again: str, terminal: TextIO | None) -> Callable[[], None]:
    """Returns what to do when a stop takes too long: print so, and end at once. Nothing committed is lost."""

    def leave() -> None:
        # Ray's agents would look for their parent for minutes; a cluster that was joined has no child here.
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        cursor = "\x1b[?25h" if terminal is not None and terminal.isatty() else ""
        text = f"{cursor}\nstopped: interrupted\nResume with: {again}"
        try:
            print(text, file=terminal or sys.stderr, flush=True)
        finally:  # nobody may be there to read it
            os._exit(1)

    return leave


@contextlib.contextmanager
def redirected(log: Path) -> Iterator[TextIO]:
    """Sends the output of this process and its children to a log; yields the terminal as it was."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for kept, number in zip(saved, (1, 2), strict=True):
            os.dup2(kept, number)
            os.close(kept)
        terminal.close()


@contextlib.contextmanager
def stopping(stop: threading.Event, leave: Callable[[], None] | None = None) -> Iterator[None]:
    """Makes Ctrl-C, SIGTERM and SIGHUP set `stop` while the context is open; a second one interrupts at once.

    Args:
        stop: The event.
        leave: Called if the stop takes too long.
    """
    timers: list[threading.Timer] = []

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if leave is not None:
            timers.append(threading.Timer(GRACE_S, leave))
            timers[-1].daemon = True
            timers[-1].start()

    main = threading.current_thread() is threading.main_thread()
    before = [(number, signal.signal(number, handle)) for number in STOPS] if main else []
    _HANDLERS[:] = [handle] if main else []
    try:
        yield
    finally:
        _HANDLERS.clear()
        for number, old in before:
            signal.signal(number, old)
        for timer in timers:
            timer.cancel()


def renew_signals() -> None:
    """Puts the handlers of `stopping` back where a library has put its own; nothing outside of it."""
    if _HANDLERS and threading.current_thread() is threading.main_thread():
        for number in STOPS:
            signal.signal(number, _HANDLERS[0])
