"""The Flower ServerApp: runs the round loop over Flower's nodes, with the cloud open beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.backends.flower import FlowerBackend
from server.cloud import open_cloud
from sim.finish import finish
from sim.loop import Progress, run_rounds
from sim.results import RunDirectory
from sim.usage import Usage
from strategies import make_strategy


def coordinate(grid: Grid, run: RunDirectory, threads: int, progress: Progress, stop: threading.Event) -> None:
    """Runs every round that is not committed yet, then turns the run directory into tables and a report.

    Raises UserError, ResumableStop (interrupt, unreachable cloud, full disk: resume goes on) and Failure.
    """
    strategy = make_strategy(run.experiment.strategy.name)
    with Usage() as usage, open_cloud(run.experiment, run) as cloud:
        run_rounds(run, FlowerBackend(grid, run, strategy, threads, stop), cloud, progress)
        truth = cloud.truth()
        finish(run, truth, cloud.facts(), usage)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry of `flwr run .`: the same run, with the experiment's fields in the run config."""
    from sim.launch import from_run_config

    run, threads, progress = from_run_config(dict(context.run_config))
    coordinate(grid, run, threads, progress, threading.Event())


def make_app(runs: Iterable[tuple[RunDirectory, int]], progress: Progress, stop: threading.Event) -> ServerApp:
    """The ServerApp of in-process runs: coordinates each, with its threads a worker, when the one before has ended.

    `runs` is asked for the next one only then. The first error ends it all.
    """
    in_process = ServerApp()

    @in_process.main()
    def run_here(grid: Grid, context: Context) -> None:
        for run, threads in runs:
            coordinate(grid, run, threads, progress, stop)

    return in_process
