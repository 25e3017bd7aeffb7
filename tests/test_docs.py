"""What the documents say about fields, columns and dependencies must stay true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from untether.sim.experiment import Experiment, fields
from untether.sim.run.directory import RunDirectory
from untether.sim.run.tables import TABLES, TRUTH
from untether.sim.studies import Study

ROOT = Path(__file__).resolve().parent.parent


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_papers_example_is_a_valid_experiment():
    block = text("paper.md").split("## Towards a reproduction")[1]
    toml = "\n".join(line[4:] for line in block.splitlines() if line.startswith("    "))
    experiment = Experiment.model_validate(tomllib.loads(toml))
    assert experiment.population.source == "lamp" and experiment.cloud.provider == "openai"


def test_every_field_the_paper_page_names_exists():
    known = {name for name, _, _ in fields()}
    named = set()
    for row in text("paper.md").split("## Claims")[0].splitlines():
        section = ""
        for word in re.findall(r"`([a-z_]*(?:\.[a-z_0-9]+)+)(?: = [^`]*)?`", row):
            if word.startswith("."):
                word = section + word
            section = word.rpartition(".")[0]
            named.add(word)
    named -= {name for name in named if name.endswith((".json", ".toml"))}
    assert len(named) > 30  # the expression above found the table
    assert named <= known


def test_the_studies_page_shows_a_valid_study_and_an_analysis_that_runs(tmp_path):
    study_text, code = (text("studies.md").split(f"```{kind}\n")[1].split("```")[0] for kind in ("toml", "python"))
    (tmp_path / "wait.toml").write_text(study_text)
    study = Study.read(str(tmp_path / "wait.toml"))
    assert [cell.name for cell in study.cells][:3] == [
        "samples=0,training=short", "samples=0,training=long", "samples=8,training=short",
    ]  # fmt: skip
    runs = {}
    for number, cell in enumerate(study.cells):
        runs[cell.name] = RunDirectory.create(tmp_path / cell.name, cell.experiment)
        frame = pd.DataFrame({"user_id": ["a", "b"], "score": [0.0, number]})
        frame.assign(arm="local", task="LaMP_2", seed=1).to_parquet(tmp_path / cell.name / "predictions.parquet")
    names: dict = {}
    exec(code, names)
    names["analyse"](study, tmp_path, runs)
    assert "- samples=32,training=long, local, LaMP_2: 2.500" in (tmp_path / "findings.md").read_text().splitlines()


@pytest.mark.parametrize("table", [*TABLES, "truth"])
def test_every_column_of_the_run_directory_is_documented(table):
    section = text("run-directory.md").split(f"## {table}.parquet")[1].split("\n## ")[0]
    documented = set(re.findall(r"`([a-z_]+)(?: [fis])?`", section)) | {"seed", "round"}
    assert set({**TABLES, "truth": TRUTH}[table].names) <= documented


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0] for requirement in wanted}
    assert names <= set(re.findall(r"`([a-z0-9-]+)`", text("dependencies.md")))
