"""A small fleet for the tests of the whole: one experiment, run in process or for real, and what came out of it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from untether.clients.device.worker import Endpoint, Models, Worker
from untether.clients.hosting.executors import InProcess
from untether.clients.hosting.in_process import InProcessBackend
from untether.clients.hosting.process import Post
from untether.sim.experiment import Experiment
from untether.sim.rounds.loop import run_rounds
from untether.sim.run.directory import RunDirectory
from untether.strategies import open_strategy

MODELS = Models()
"""Those of the runs in this process, loaded once."""
NOWHERE = Endpoint("http://127.0.0.1:9/v1", "none")
KEYS = ["seed", "round", "device_id", "arm", "task", "query_id"]


def tiny(**changes) -> Experiment:
    """Four devices with two tasks that take two optimizer steps; `changes` are dotted fields, dots as `__`."""
    fields = {
        "name": "tiny", "arms": "local,placebo,collaborative,cloud", "population.users": "4", "population.queries": "2",
        "population.history": "[4, 6]", "population.tasks": "LaMP_3,LaMP_7", "cloud.samples": "4",
        "training.steps": "2", "training.batch_size": "2", "generation.max_new_tokens": "6",
        "engine.threads": "1", "engine.workers": "2", "evaluation.resamples": "100",
    }  # fmt: skip
    return Experiment.read(None, fields | {key.replace("__", "."): str(value) for key, value in changes.items()})


def run_in_process(
    path: Path, experiment: Experiment, endpoint: Endpoint, hosts: int = 1, worker=None, backwards: bool = False
) -> RunDirectory:
    """The rounds of an experiment without Flower and Ray: the same loop and passes on one worker, host after host.

    `worker` is one that has loaded its models already, to be used again on this run directory. `backwards` names the
    devices, to every host, from the last to the first, and the hosts too.
    """
    run = RunDirectory.create(path, experiment)
    fresh = make_worker(run, endpoint, worker)
    backend = InProcessBackend(run, InProcess(lambda: fresh), hosts, backwards)
    run_rounds(run, backend, open_strategy(experiment), Silent())
    run.merge(experiment)
    return run


def make_worker(run: RunDirectory, endpoint: Endpoint, like: Worker | None = None) -> Worker:
    """A worker of a run in this process, with the models of another one."""
    models = like.models if like is not None else MODELS
    return Worker(run.experiment, endpoint, run.path / "state", threads=1, models=models)


def make_post(run: RunDirectory, endpoint: Endpoint = NOWHERE) -> Post:
    """What a worker process is told with each call."""
    return Post(str(run.path), run.experiment.to_toml(), endpoint, str(run.path / "state"), threads=1)


class Silent:
    """Nobody watches."""

    def start(self, *_): ...

    def begin(self, *_): ...

    def update(self, *_): ...

    def end(self): ...

    def note(self, *_): ...


def answers(run: RunDirectory) -> pd.DataFrame:
    """What was answered and how it scored, in one order."""
    frame = run.read("predictions").sort_values(KEYS).reset_index(drop=True)
    return frame[[*KEYS, "input", "gold", "prediction", "score", "outcome", "answered_by"]]


def metrics(run: RunDirectory) -> pd.DataFrame:
    """The scores by user, in one order."""
    columns = ["seed", "round", "device_id", "user_id", "arm", "task", "metric", "value", "n"]
    return run.read("metrics")[columns].sort_values(columns[:7]).reset_index(drop=True)


def losses(run: RunDirectory) -> pd.DataFrame:
    """Every loss that was kept, in one order."""
    columns = ["seed", "round", "device_id", "arm", "step", "loss"]
    return run.read("training")[columns].sort_values(columns[:5]).reset_index(drop=True)


def verdicts(run: RunDirectory) -> pd.DataFrame:
    """What became of every sample, in one order."""
    columns = ["seed", "round", "sample_id", "device_id", "task", "input", "output", "verdict", "semantic", "diversity"]
    return run.read("samples")[columns].sort_values(columns[:3]).reset_index(drop=True)
