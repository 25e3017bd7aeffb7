"""The one runner of all studies.

Each cell is an ordinary run directory under `cells/`, so a study goes on where it stopped and a finished cell is not
run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sim.launch import check
from sim.results import RunDirectory
from sim.studies.analysis import make_analysis
from sim.studies.study import Cell, Study


def run_study(study: Study, out: Path, run_cells: Callable[[Sequence[RunDirectory]], None]) -> Path:
    """Runs the cells that are not finished yet, then writes table, figures and findings into `out`.

    `run_cells` runs run directories to their end, all but the finished ones (`sim.launch.launch`). Returns `out`.
    Raises UserError where a cell is invalid, or `out` holds a cell of that name with another experiment.
    """
    for cell in study.cells:
        if not RunDirectory(_path(cell, out)).finished:
            check(cell.experiment)
    runs = {cell.name: _run_directory(cell, out) for cell in study.cells}
    run_cells(list(runs.values()))
    make_analysis(study.spec.analysis)(study, out, runs)
    return out


def _path(cell: Cell, out: Path) -> Path:
    return out / "cells" / cell.name


def _run_directory(cell: Cell, out: Path) -> RunDirectory:
    path = _path(cell, out)
    if not (path / "experiment.toml").exists():
        return RunDirectory.create(path, cell.experiment)
    run = RunDirectory.open(path)
    run.check_resumable(cell.experiment)
    return run
