"""The Flower ServerApp, as `flwr run` starts it: on Flower's simulation runtime, or on a deployment's SuperLink."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from untether.server.backends.exchange import nodes
from untether.server.backends.flower import greet
from untether.server.coordinator import coordinate
from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.deployed import NODES
from untether.sim.launch.app_config import AppConfig, from_run_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carries out the run that `untether run` would, with the experiment's fields from the run config."""
    config = AppConfig.read(context.run_config)
    hosts: dict[int, int] = {}
    if config.experiment.population.source == NODES and config.resume is None:
        path, hosts = _told(grid, config.experiment, config.folder)
        config = config.with_users(path)
    run, threads, progress = from_run_config(config)
    coordinate(grid, run, threads, progress, threading.Event(), hosts)
    print(f"report:        {run.path.resolve() / 'report.html'}", flush=True)


def _told(grid: Grid, experiment: Experiment, folder: Path) -> tuple[Path, dict[int, int]]:
    """Asks the nodes what planning needs to know of their users; returns the file that keeps it, and who they are."""
    count, patience_s, stop = experiment.population.users, 2 * experiment.engine.deadline_s, threading.Event()
    print(f"waiting for {count} nodes ...", flush=True)
    said = greet(grid, nodes(grid, count, patience_s, stop), patience_s, stop, asking=experiment.to_toml())
    if missing := sorted(set(range(count)) - set(said)):
        raise UserError(
            f"nodes have the numbers {sorted(said)}, and none has {missing[0]}. Number them from 0 in --node-config: "
            "partition-id=0, partition-id=1, ..."
        )
    path = folder / "state" / "nodes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(str(said[number].content["host"]["told"])) for number in range(count)]
    write_atomically(path, json.dumps(found))
    return path, {number: message.metadata.src_node_id for number, message in said.items()}
