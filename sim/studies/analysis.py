"""Analyses by name: what turns a study's finished cells into its table, its figures and its sentences."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sim.errors import UserError, unknown
from sim.results import RunDirectory

if TYPE_CHECKING:
    from sim.studies.study import Study

Analysis = Callable[["Study", Path, Mapping[str, RunDirectory]], None]
"""Writes `table.csv`, `figures/` and `findings.md` into a folder, from the finished runs by their cells' names."""

_FACTORIES: dict[str, Callable[[], Analysis]] = {}


def register(name: str, factory: Callable[[], Analysis]) -> None:
    """Makes an analysis known by name; a name can be given once. The factory is called when the cells are finished."""
    if name in _FACTORIES:
        raise ValueError(f"analysis `{name}` is registered already")
    _FACTORIES[name] = factory


def check_analysis(name: str) -> None:
    """Raises UserError, which lists the known ones, for an unknown name."""
    if name not in _FACTORIES:
        raise UserError(f"analysis: {unknown('analysis', name, _FACTORIES)}")


def make_analysis(name: str) -> Analysis:
    """The analysis of that name."""
    check_analysis(name)
    return _FACTORIES[name]()


def _in(module: str) -> Callable[[], Analysis]:
    """A module's `analyse`, imported late: reading a study should not wait for matplotlib."""
    return lambda: importlib.import_module(module).analyse


register("gain", _in("sim.studies.gain"))
register("scale", _in("sim.studies.scale"))
register("connectivity", _in("sim.studies.connectivity"))
register("drift", _in("sim.studies.drift"))
register("away", _in("sim.studies.away"))
