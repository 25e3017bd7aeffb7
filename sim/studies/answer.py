"""Writers for the files of a study's folder: `table.csv`, figures and `findings.md`. Every analysis uses them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.durable import write_atomically
from untether.sim.report.figures import save
from untether.sim.studies.study import Study


def write_table(out: Path, frame: pd.DataFrame) -> None:
    """Writes `table.csv`; floats have four digits."""
    write_atomically(out / "table.csv", frame.to_csv(index=False, float_format="%.4f"))


def save_figure(out: Path, name: str, figure: Figure, caption: str = "") -> None:
    """Writes `figures/NAME.svg` and `.pdf`, and closes the figure. Draw within `sim.report.figures.style()`.

    The report shows every SVG there, in the order of their names, with its caption (kept as the SVG's title).
    """
    save(figure, out / "figures", name, caption)


def write_findings(study: Study, out: Path, sentences: Iterable[str], notes: Iterable[str] = ()) -> None:
    """Writes `findings.md`.

    Args:
        study: Its question comes first.
        out: The study's folder.
        sentences: A bullet each; text may hold `code`.
        notes: A paragraph each.
    """
    lines = [f"# {study.spec.question}", "", *(f"- {sentence}" for sentence in sentences)]
    lines += [line for note in notes for line in ("", note)]
    write_atomically(out / "findings.md", "\n".join(lines) + "\n")
