"""The coordinator of runs: the round loop over Flower's nodes, with the cloud available beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from untether.server.backends.flower import FlowerBackend
from untether.server.cloud import open_cloud
from untether.sim.report.finish import finish
from untether.sim.rounds.loop import Progress, run_rounds
from untether.sim.rounds.tracking import tracked
from untether.sim.run.directory import RunDirectory
from untether.sim.run.places import announced
from untether.sim.run.usage import Usage
from untether.strategies import open_strategy


def coordinate(
    grid: Grid, run: RunDirectory, threads: int, progress: Progress, stop: threading.Event,
    hosts: Mapping[int, int] | None = None,
) -> None:  # fmt: skip
    """Runs every round that is not committed yet, then turns the run directory into tables and a report.

    Args:
        grid: Flower's grid.
        run: The run directory.
        threads: Torch threads of each worker.
        progress: Receives what is done.
        stop: Set from outside to stop the run, resumably.
        hosts: Node ids by partition, where they are known; otherwise the nodes are asked.

    Raises:
        UserError: A mistake in the experiment or the input.
        ResumableStop: An interrupt, an unreachable cloud or a full disk; the run can be resumed.
        Failure: A defect.
    """
    strategy = open_strategy(run.experiment)
    with (
        Usage() as usage, announced(run) as name, open_cloud(run.experiment, run) as cloud,
        tracked(run, progress) as watching,
    ):  # fmt: skip
        run_rounds(run, FlowerBackend(grid, run, name, strategy, cloud, threads, stop, hosts), strategy, watching)
        progress.update("report", {}, 0)
        truth = cloud.truth()
        finish(run, truth, cloud.facts(), usage)


def make_app(
    runs: Iterable[tuple[RunDirectory, int]], progress: Progress, stop: threading.Event, failed: list[BaseException]
) -> ServerApp:
    """Returns the ServerApp of in-process runs, which coordinates them one after the other.

    Args:
        runs: Run directories, each with the threads of a worker; the next is requested when the one before has ended.
        progress, stop: As in `coordinate`.
        failed: Receives the first error, which ends everything: Flower does not raise it where its caller handles
            another exception.
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
