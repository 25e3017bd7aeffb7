"""The one runner of all studies.

Each cell of the grid is an ordinary run directory under `cells/`, so a study goes on where it stopped and a finished
cell is not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from sim.errors import UserError
from sim.launch import check
from sim.results import RunDirectory
from sim.studies.answer import write_answer
from sim.studies.study import Study, word


def run_study(study: Study, out: Path, run_cell: Callable[[RunDirectory], None], say: Callable[[str], None]) -> Path:
    """Runs the cells that are not finished yet, then writes table, figure and findings into `out`.

    `run_cell` runs one run directory to its end (`sim.launch.launch`). Returns `out`.
    """
    waiting = [cell for cell in study.cells if not (out / "cells" / cell.name / "summary.json").exists()]
    for cell in waiting:
        check(cell.experiment)
    for number, cell in enumerate(waiting, start=1):
        say(f"cell {number} of {len(waiting)}: {cell.name}")
        path = out / "cells" / cell.name
        if (path / "experiment.toml").exists():
            run = RunDirectory.open(path)
            if run.experiment != cell.experiment:
                raise UserError(f"{path} holds another experiment than this study's cell. Give another --out")
        else:
            run = RunDirectory.create(path, cell.experiment)
        run_cell(run)
    write_answer(study, out, collect(study, out))
    return out


def collect(study: Study, out: Path) -> pd.DataFrame:
    """The summary rows of all cells, with the cell's name and the values of its fields in front."""
    rows = []
    for cell in study.cells:
        summary = RunDirectory.open(out / "cells" / cell.name).read_json("summary.json")
        axes = {key: word(value) for key, value in cell.values.items()}
        rows += [{"cell": cell.name, **axes, **row} for row in summary["rows"]]
    return pd.DataFrame(rows)
