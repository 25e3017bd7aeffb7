"""Studies: a grid of runs over a few fields; the figures, table and sentences that answer a question."""

from untether.sim.studies.runner import run_study
from untether.sim.studies.study import Cell, Study

__all__ = ["Cell", "Study", "run_study"]
