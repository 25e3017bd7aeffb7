"""A study's page: its findings, figures and table in one self-contained HTML file."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import tomlkit

from untether.sim.core.durable import write_atomically
from untether.sim.report.html import inline, template
from untether.sim.studies.frames import Runs, each_cell
from untether.sim.studies.study import Study


def write_study_report(study: Study, out: Path, runs: Runs, command: str = "") -> Path:
    """Writes `report.html` from the analysis's files in `out`; a table or a figure that is missing is left out."""
    findings, notes = _findings((out / "findings.md").read_text(encoding="utf-8"))
    table = out / "table.csv"
    page = template("sim/studies/study.html.jinja").render(
        study=study,
        command=command,
        findings=findings,
        notes=notes,
        figures=list(_figures(out / "figures")),
        table=pd.read_csv(table, dtype=str, keep_default_na=False) if table.exists() else None,
        numeric=_is_numeric,
        cells=[(cell, _facts(run.read_json("environment.json") or {})) for cell, run in each_cell(study, runs)],
        base=tomlkit.dumps(study.spec.base),
        variants=tomlkit.dumps(study.spec.variants),
    )
    write_atomically(out / "report.html", page)
    return out / "report.html"


def _findings(text: str) -> tuple[list[str], list[str]]:
    """The bullets and the paragraphs below the title, as `sim.studies.answer.write_findings` sets them."""
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    return [line[2:] for line in lines if line.startswith("- ")], [line for line in lines if not line.startswith("- ")]


def _figures(folder: Path) -> Iterator[tuple[Any, str]]:
    """Every SVG for the middle of the page, with its title as the caption."""
    for path in sorted(folder.glob("*.svg")):
        svg = path.read_text(encoding="utf-8")
        title = re.search(r"<dc:title>(.*?)</dc:title>", svg, re.DOTALL)
        yield inline(svg, path.stem), html.unescape(title[1]) if title else ""


def _facts(environment: dict[str, Any]) -> tuple[str, str]:
    commit, plus, changes = str(environment.get("commit") or "").partition("+")
    return commit[:12] + plus + changes, str(environment.get("ended") or "")


def _is_numeric(values: Sequence[str]) -> bool:
    return pd.to_numeric(pd.Series(values).replace("", None), errors="coerce").notna().any()
