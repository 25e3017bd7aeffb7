"""Analyses by name: what turns a study's finished cells into its table, its figures and its sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from untether.sim.core.registry import Registry
from untether.sim.run.directory import RunDirectory

Analysis = Callable[[Any, Path, Mapping[str, RunDirectory]], None]
"""Writes `table.csv`, `figures/` and `findings.md` of a `Study` into a folder, from the finished runs by their cells'
names."""

# Imported when the cells are finished: reading a study should not wait for matplotlib.
ANALYSES: Registry[Analysis] = Registry("analysis", "analysis", {
    "gain": "untether.sim.studies.gain:analyse",
    "scale": "untether.sim.studies.scale.scale:analyse",
    "connectivity": "untether.sim.studies.connectivity.connectivity:analyse",
    "drift": "untether.sim.studies.drift.drift:analyse",
    "away": "untether.sim.studies.drift.away:analyse",
})  # fmt: skip
