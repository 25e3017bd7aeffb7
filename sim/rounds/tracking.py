"""Each round's figures in TensorBoard, MLflow or Weights & Biases, beside the run directory, for who looks there.

Off by default (`engine.track`). What a tracker does, it does in a thread of its own: a missing package or key, a dead
server or a slow one costs a note, never the run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from untether.sim.core.kinds import TRACKERS
from untether.sim.rounds.loop import Progress
from untether.sim.rounds.work import Work
from untether.sim.run.directory import RunDirectory

PATIENCE_S = 20.0
"""How long a finished run waits for what its trackers have not sent yet."""


class Tracker(Protocol):
    """What a registered tracker's maker returns; it is called with the run directory. Any error ends the tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the values after a round; `step` counts rounds over all seeds, from 0."""

    def close(self) -> None:
        """Sends what is left."""


class TensorBoard:
    """Event files in `tensorboard/` of the run directory: `tensorboard --logdir runs`."""

    def __init__(self, run: RunDirectory):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes a scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class MLflow:
    """A run of the MLflow experiment that is named like the untether experiment, at MLFLOW_TRACKING_URI."""

    def __init__(self, run: RunDirectory):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its default waits for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import pandas as pd
        from mlflow.tracking import MlflowClient

        self._client, experiment = MlflowClient(), run.experiment
        known = self._client.get_experiment_by_name(experiment.name)
        place = known.experiment_id if known else self._client.create_experiment(experiment.name)
        self._run = _again(run, "mlflow", lambda: self._client.create_run(place, run_name=run.path.name).info.run_id)
        for name, value in pd.json_normalize(experiment.model_dump(mode="json"), sep=".").iloc[0].items():
            self._client.log_param(self._run, str(name), str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs a metric a value."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run of the W&B project `untether`; without a key, an offline one in the run directory (`wandb sync`)."""

    def __init__(self, run: RunDirectory):
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "untether", name=run.path.name, dir=str(run.path), mode=mode,
            id=_again(run, "wandb", lambda: uuid.uuid4().hex[:8]), resume="allow",
            config=run.experiment.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE_S),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


@contextlib.contextmanager
def tracked(run: RunDirectory, progress: Progress) -> Iterator[Progress]:
    """Gives a run's progress back as one that tells the experiment's trackers, too, of every round that is committed.

    In the end they have a while to send what has not been sent.
    """
    trackers = [_InBackground(name, run, progress.note) for name in run.experiment.engine.track]
    try:
        yield _Tracked(run, progress, trackers) if trackers else progress
    finally:
        for tracker in trackers:
            tracker.close()


class _Tracked:
    """Progress that is passed on; trackers hear what a round came to."""

    def __init__(self, run: RunDirectory, progress: Progress, trackers: Sequence[_InBackground]):
        self._run, self._progress, self._begun, self._trackers = run, progress, (0, 0), trackers

    def start(self, seeds: Sequence[int], rounds: int, rounds_done: int) -> None:
        self._progress.start(seeds, rounds, rounds_done)

    def begin(self, seed: int, round: int) -> None:
        self._begun = seed, round
        self._progress.begin(seed, round)

    def update(self, stage: str, work: Work, total: int) -> None:
        self._progress.update(stage, work, total)

    def end(self) -> None:
        self._progress.end()
        experiment, (seed, round) = self._run.experiment, self._begun
        step = experiment.seeds.index(seed) * experiment.rounds + round
        values = round_values(self._run, seed, round)
        for tracker in self._trackers:
            tracker.log(values, step)

    def note(self, text: str) -> None:
        self._progress.note(text)


def round_values(run: RunDirectory, seed: int, round: int) -> dict[str, float]:
    """Returns a committed round's figures by name: `TASK/METRIC/ARM`, means over users, and `work/...`, its counts.

    With several seeds each name begins with `seed-S/`.
    """
    commit = run.committed(seed, round) or {"parts": {}, "facts": {}}
    before = f"seed-{seed}/" if len(run.experiment.seeds) > 1 else ""
    frame = run.read_parts(commit["parts"].get("metrics", ()))
    found = {}
    if len(frame):
        for (task, metric, arm), value in frame.groupby(["task", "metric", "arm"])["value"].mean().items():
            found[f"{before}{task}/{metric}/{arm}"] = float(value)
    for name, count in commit["facts"].get("totals", {}).items():
        found[f"{before}work/{name}"] = float(count)
    return found


class _InBackground:
    """A tracker in a thread: calls are queued, and the first that fails is noted and ends it."""

    def __init__(self, name: str, run: RunDirectory, note: Callable[[str], None]):
        self._name, self._note = name, note
        self._waiting: queue.SimpleQueue[tuple[Mapping[str, float], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"track-{name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._waiting.put((values, step))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._note(f"{self._name} does not answer: what it was not told is not waited for (engine.track)")

    def _work(self, run: RunDirectory) -> None:
        try:
            tracker: Tracker = TRACKERS.bind(self._name, run.experiment.settings)(run)
            while (told := self._waiting.get()) is not None:
                tracker.log(*told)
            tracker.close()
        except ImportError as error:
            self._note(f"nothing is sent to {self._name}: {error}. Install it: pip install 'untether[{self._name}]'")
        except Exception as error:  # whatever a library, a server or a network comes up with
            first = next(iter(str(error).splitlines()), "")
            self._note(f"nothing more is sent to {self._name}: {type(error).__name__}: {first}")


def _again(run: RunDirectory, name: str, make: Callable[[], str]) -> str:
    """The id that this run has with a tracker: a resumed one goes on under it."""
    path = f"state/{name}.json"
    known: dict[str, Any] = run.read_json(path) or {}
    if "id" not in known:
        known = {"id": make()}
        run.write_json(path, known)
    return str(known["id"])
