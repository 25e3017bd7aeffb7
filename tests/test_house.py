"""The walls of the house: who may import whom, read from the source itself."""

import ast
from pathlib import Path

import pytest

FORBIDDEN = {"clients": {"server", "strategies"}, "server": {"clients"}, "strategies": {"clients"}}
GROUND = ("sim/experiment.py", "sim/section.py", "sim/sections.py", "sim/virtual_sections.py", "sim/clock.py",
          "sim/records.py", "sim/seeding.py", "sim/errors.py", "sim/limits.py")  # fmt: skip


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_apart(package):
    found = [(str(p), name) for p in Path(package).rglob("*.py") for name in _imports(p)
             if name.split(".")[0] in FORBIDDEN[package]]  # fmt: skip
    assert found == []


def test_the_ground_floor_imports_nothing_of_the_project_but_itself():
    allowed = {name.removesuffix(".py").replace("/", ".") for name in GROUND}
    for name in GROUND:
        ours = {i for i in _imports(Path(name)) if i.split(".")[0] in ("sim", "clients", "server", "strategies")}
        assert ours <= allowed, name


def test_only_the_clock_waits():
    waiting = [str(p) for package in ("sim", "clients", "strategies") for p in Path(package).rglob("*.py")
               if "time.sleep(" in p.read_text()]  # fmt: skip
    assert sorted(waiting) == ["clients/answer_cache.py", "sim/clock.py"], "and a locked database, which is waited for"
