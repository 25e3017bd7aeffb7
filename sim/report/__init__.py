"""What a finished run looks like to people: one self-contained report.html, figures and tables for a paper."""

from __future__ import annotations

from pathlib import Path

from untether.sim.run.directory import RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Writes `report.html`, `figures/` and `tables/` of a finished run and returns the report's path.

    Reads experiment.toml, summary.json, environment.json and the Parquet tables; a table or file that is missing is
    reported as empty. Writing it again gives the same bytes.
    """
    # Imported late: the terminal reads `sim.report.summary` and should not wait for matplotlib.
    from untether.sim.report.html import write_report as write

    return write(run)
