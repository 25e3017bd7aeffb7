"""Coordinates runs: the round loop over Flower's nodes, with the cloud open beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from untether.server.backends.flower import FlowerBackend
from untether.server.cloud import open_cloud
from untether.sim.report.finish import finish
from untether.sim.rounds.loop import Progress, run_rounds
from untether.sim.run.directory import RunDirectory
from untether.sim.run.places import announced
from untether.sim.run.usage import Usage
from untether.strategies import open_strategy


def coordinate(grid: Grid, run: RunDirectory, threads: int, progress: Progress, stop: threading.Event) -> None:
    """Runs every round that is not committed yet, then turns the run directory into tables and a report.

    Raises UserError, ResumableStop (interrupt, unreachable cloud, full disk: resume goes on) and Failure.
    """
    strategy = open_strategy(run.experiment)
    with Usage() as usage, announced(run) as name, open_cloud(run.experiment, run) as cloud:
        run_rounds(run, FlowerBackend(grid, run, name, strategy, cloud, threads, stop), strategy, progress)
        truth = cloud.truth()
        finish(run, truth, cloud.facts(), usage)


def make_app(
    runs: Iterable[tuple[RunDirectory, int]], progress: Progress, stop: threading.Event, failed: list[BaseException]
) -> ServerApp:
    """The ServerApp of in-process runs: coordinates each, with its threads a worker, when the one before has ended.

    `runs` is asked for the next one only then. The first error ends it all; it is put into `failed`, too, since Flower
    does not raise it where its caller handles another exception.
    """
    in_process = ServerApp()

    @in_process.main()
    def run_here(grid: Grid, context: Context) -> None:
        try:
            for run, threads in runs:
                coordinate(grid, run, threads, progress, stop)
        except BaseException as error:
            failed.append(error)
            raise

    return in_process
