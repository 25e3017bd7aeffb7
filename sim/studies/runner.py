"""The runner of all studies.

Each cell is an ordinary run directory under `cells/`, so a study resumes where it stopped and a finished cell is not
run again. Cells share results under `cache/`: answers of the cloud and of devices, embeddings and adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from untether.sim.core.kinds import ANALYSES
from untether.sim.experiment import Experiment
from untether.sim.launch.arithmetic import settled
from untether.sim.launch.runtime import check
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.study import Study

Analysis = Callable[[Study, Path, Mapping[str, RunDirectory]], None]
"""Writes `table.csv`, `figures/` and `findings.md` of a study into a folder, from the finished runs by their cells'
names.
"""


def run_study(
    study: Study, out: Path, run_cells: Callable[[Sequence[RunDirectory]], None], command: str = ""
) -> Path:
    """Runs the cells that are not finished yet, then writes table, figures, findings and `report.html`.

    Args:
        study: The study.
        out: Its folder.
        run_cells: Runs unfinished run directories to their end (`sim.launch.runtime.launch`).
        command: The command that was given, for the report.

    Returns:
        `out`.

    Raises:
        UserError: A cell is invalid, or `out` holds a cell of that name with another experiment.
    """
    runs = {cell.name: RunDirectory(out / "cells" / cell.name) for cell in study.cells}
    experiments = {cell.name: _sharing(cell.experiment, out.resolve() / "cache") for cell in study.cells}
    for name, run in runs.items():
        if not run.finished:
            check(experiments[name])
    for name, run in runs.items():
        _make(run, experiments[name])
    run_cells(list(runs.values()))
    from untether.sim.studies.report import write_study_report  # late: reading a study should not wait for matplotlib

    analyse: Analysis = ANALYSES.bind(study.spec.analysis, study.cells[0].experiment.settings)
    analyse(study, out, runs)
    write_study_report(study, out, runs, command)
    return out


def _sharing(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with the study's caches, where the base says nothing of its own (an empty one: no cache)."""
    sections = {"cloud": str(folder / "answers.sqlite"), "engine": str(folder)}
    return experiment.model_copy(update={
        name: getattr(experiment, name).model_copy(update={"cache": cache})
        for name, cache in sections.items() if "cache" not in getattr(experiment, name).model_fields_set
    })  # fmt: skip


def _make(run: RunDirectory, experiment: Experiment) -> None:
    """The cell's run directory: made, or as a stopped study left it."""
    if not (run.path / "experiment.toml").exists():
        RunDirectory.create(run.path, settled(experiment))
    else:
        experiment = settled(experiment, run.experiment)
        run.check_resumable(experiment)
        if not run.finished:
            run.take_over(experiment)
