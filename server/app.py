"""The Flower ServerApp, as `flwr run .` starts it."""

from __future__ import annotations

import threading

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from untether.server.coordinator import coordinate
from untether.sim.launch.runtime import from_run_config

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carries out the run that `untether run` would, with the experiment's fields from the run config."""
    run, threads, progress = from_run_config(dict(context.run_config))
    coordinate(grid, run, threads, progress, threading.Event())
    print(f"report:        {run.path.resolve() / 'report.html'}", flush=True)
