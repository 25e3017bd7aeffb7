"""What a Flower app is told by `flwr run`: the arguments of `untether run`, as a run config."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from untether.sim.experiment import Experiment, key_values
from untether.sim.launch.progress import LiveProgress
from untether.sim.launch.resources import Resources
from untether.sim.launch.runtime import next_run_directory, prepare, reopen
from untether.sim.run.directory import RunDirectory


@dataclass(frozen=True)
class AppConfig:
    """The run config of an app that Flower started (`flwr run`): the arguments of `untether run`, and `nodes`."""

    experiment: Experiment
    folder: Path
    resume: Path | None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> AppConfig:
        """Reads `experiment` (a TOML file), `set` (KEY=VALUE words, quoted as for a shell), `out`, `resume` (a run
        directory) and `nodes`: on how many deployed nodes the run is (0: it is a simulation).
        """
        experiment, set_, out, resume = (str(config.get(name, "")).strip() for name in ("experiment", "set", "out",
                                                                                         "resume"))  # fmt: skip
        stopped = Path(resume).expanduser() if resume else None
        fields = key_values(shlex.split(set_), "--run-config set")
        if count := int(config.get("nodes", 0)):
            fields = {"population.users": str(count), "hardware.clock": "wall", **fields}
        file = Path(experiment).expanduser() if experiment else stopped and stopped / "experiment.toml"
        found = Experiment.read(file, fields)
        return cls(found, Path(out).expanduser() if out else next_run_directory(found.name), stopped)

    def with_users(self, path: Path) -> AppConfig:
        """Returns the config with the file that says who the nodes' users are."""
        population = self.experiment.population.model_copy(update={"path": str(path.resolve())})
        return replace(self, experiment=self.experiment.model_copy(update={"population": population}))


def from_run_config(config: AppConfig) -> tuple[RunDirectory, int, LiveProgress]:
    """Returns the run directory, threads a worker and progress of an app that Flower started."""
    run = reopen(config.resume, config.experiment) if config.resume else prepare(config.experiment, config.folder)
    layout = Resources.of(config.experiment, config.experiment.population.users)
    print(f"run directory: {run.path.resolve()}", flush=True)
    return run, layout.threads, LiveProgress()
