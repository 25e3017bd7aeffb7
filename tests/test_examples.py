"""The examples are valid experiments, and the code in the README is."""

import ast
import re
from pathlib import Path

import pytest

from untether.sim.experiment import Experiment


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_validate(path):
    assert Experiment.read(path).name == path.stem


def test_settings_in_the_readme_are_fields():
    text = Path("README.md").read_text()
    pairs = re.findall(r"--set ([\w.]+)=(\S+)", text)
    assert len(pairs) > 5
    known = {"cloud.provider": "openai", "cloud.base_url": "http://x/v1", "cloud.model": "m", "population.path": "x"}
    for key, value in pairs:
        Experiment.read(None, {**(known if key.startswith(("cloud", "population")) else {}), key: value})
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        ast.parse(block)
