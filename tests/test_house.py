"""The walls of the house: who may import whom, read from the source itself (late imports and those for types too)."""

import ast
from functools import cache
from pathlib import Path

import pytest

from untether.sim.core import kinds
from untether.sim.core.registry import Registry

PACKAGES = ("sim", "clients", "server", "strategies")
FORBIDDEN = {"clients": {"server"}, "server": {"clients"}, "strategies": {"clients", "server"}}
ROOF = {"sim.launch", "sim.studies", "sim.terminal"}
"""The rooms of `sim` that may know who carries a run out."""


@cache
def imports() -> dict[str, set[str]]:
    """Which modules of the project each one imports, without the leading `untether.`."""
    files = {path: ".".join(path.with_suffix("").parts) for package in PACKAGES for path in Path(package).rglob("*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in files.items()}
    known = set(names.values())
    found = {}
    for path, name in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                said = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are absolute"
                said = [
                    whole if (whole := f"{node.module}.{alias.name}").removeprefix("untether.") in known
                    else node.module for alias in node.names
                ]  # fmt: skip
            else:
                continue
            assert not {word.split(".")[0] for word in said} & set(PACKAGES), f"{path}: import from `untether`"
            found[name] |= {word.removeprefix("untether.") for word in said if word.startswith("untether.")} & known
    return found


def room(module: str) -> str:
    """The folder that a module stands in, at most two deep: `sim.time` of `sim.time.network.link`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if Path(*parts[:2]).is_dir() else module


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of more than one that reach each other."""
    reached = {start: set() for start in edges}
    for start, seen in reached.items():
        waiting = list(edges[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += edges.get(name, ())
    groups = {tuple(sorted({a, *(b for b in reached[a] if a in reached.get(b, ()))})) for a in edges}
    return [list(group) for group in sorted(groups) if len(group) > 1]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_apart(package):
    found = [
        (module, other) for module, others in imports().items() for other in others
        if module.split(".")[0] == package and other.split(".")[0] in FORBIDDEN[package]
    ]  # fmt: skip
    assert found == []


def test_only_the_roof_of_sim_knows_who_carries_a_run_out():
    found = [
        (module, other) for module, others in imports().items() for other in others
        if module.startswith("sim.") and room(module) not in ROOF and not other.startswith("sim")
    ]  # fmt: skip
    assert found == []


def test_the_ground_floor_imports_nothing_of_the_project_but_itself():
    found = {other for module, others in imports().items() if room(module) == "sim.core" for other in others}
    assert {name for name in found if room(name) not in ("sim.core", "sim")} == set()


def test_the_engine_stands_alone():
    """It needs the ground floor, and how a chat template is told what to print."""
    found = {other for module, others in imports().items() if room(module) == "clients.engine" for other in others}
    outside = {name for name in found if room(name) not in ("clients.engine", "sim.core")}
    assert outside <= {"sim.prompts", "sim.prompts.chat_template", "sim.prompts.checkpoint"}


def test_no_module_imports_itself_by_way_of_another():
    assert circles(imports()) == []


def test_no_room_needs_another_that_needs_it():
    rooms: dict[str, set[str]] = {}
    for module, others in imports().items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others if room(other) != room(module))
    assert circles(rooms) == []


def test_a_room_holds_a_dozen_things():
    folders = {path.parent for package in PACKAGES for path in Path(package).rglob("*.py")}
    sizes = {
        str(folder): len({path.stem for path in folder.glob("*.py") if path.stem != "__init__"})
        + len([path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))])
        for folder in folders
    }  # fmt: skip
    assert {folder: size for folder, size in sizes.items() if size > 12} == {}


def test_only_the_clock_waits():
    waiting = [str(p) for package in ("sim", "clients", "strategies") for p in Path(package).rglob("*.py")
               if "time.sleep(" in p.read_text()]  # fmt: skip
    allowed = ["clients/cloud/answer_cache.py", "sim/core/clock.py"]
    assert sorted(waiting) == allowed, "and a locked database, which is waited for"


def test_a_name_means_one_thing():
    """Of public classes; private ones and those of tests may repeat."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in Path(package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(str(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


@pytest.mark.parametrize("registry", [r for r in vars(kinds).values() if isinstance(r, Registry)], ids=lambda r: r.kind)
def test_every_name_that_an_experiment_can_give_leads_somewhere(registry):
    assert registry.built_in()
    for name in registry.built_in():
        assert registry.get(name) is not None
