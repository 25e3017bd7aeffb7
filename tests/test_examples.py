"""The examples are valid experiments, and the code in the README is."""

import ast
import json
import re
from pathlib import Path

import pytest

from untether.api import Run
from untether.sim.experiment import Experiment
from untether.sim.studies.study import Study


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_validate(path):
    assert Experiment.read(path).name == path.stem


@pytest.mark.parametrize("path", sorted(Path("examples/studies").glob("*.toml")), ids=lambda path: path.name)
def test_studies_validate(path):
    """But for the data that they name: nobody else has it."""
    study = Study.read(str(path))
    assert study.spec.name == path.stem and len(study.cells) > 1


def test_settings_in_the_readme_are_fields():
    text = Path("README.md").read_text()
    pairs = re.findall(r"--set ([\w.]+)=(\S+)", text)
    assert len(pairs) > 5
    known = {"cloud.provider": "openai", "cloud.base_url": "http://x/v1", "cloud.model": "m", "population.path": "x"}
    for key, value in pairs:
        Experiment.read(None, {**(known if key.startswith(("cloud", "population")) else {}), key: value})
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        ast.parse(block)


def test_the_notebooks_cells_name_what_there_is():
    """Its code parses, its experiment is one, and it reads what a run has."""
    cells = json.loads(Path("examples/notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    (made,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Experiment"]
    Experiment(**{word.arg: ast.literal_eval(word.value) for word in made.keywords})
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if ast.unparse(node.value) == "mine"}
    assert read >= {"metrics", "samples"} and all(hasattr(Run, name) for name in read)
