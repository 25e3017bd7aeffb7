"""What a page names is there: its Python blocks run, its commands parse, its fields, files and names exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import typer

from tests.sim.timelines import run, timeline
from untether.clients.hosting.node import Node
from untether.plugins import apart
from untether.sim.experiment import Experiment, fields
from untether.sim.run.directory import RunDirectory
from untether.sim.run.tables import TABLES
from untether.sim.studies import Study
from untether.sim.terminal.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HOUSE = ("sim", "clients", "server", "strategies", "bench", "tests", "docs", "examples")
KNOWN = {name for name, _, _ in fields()}
SECTIONS = {name[:end] for name in KNOWN for end in (place.start() for place in re.finditer(r"\.", name))}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, and of each indented one (no language)."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:\A|\n\n)((?:    .*\n|\n(?=    ))+)", rest)
    return [*fenced, *(("", "\n".join(line[4:] for line in block.split("\n"))) for block in indented)]


def python(page: Path) -> list[str]:
    return [
        text for language, text in blocks(page)
        if language == "python" or (not language and re.search(r"^(from \S+ )?import \w", text, re.M))
    ]  # fmt: skip


def write_files(page: Path, folder: Path) -> None:
    """The Python blocks that begin with a file's name, as files."""
    for code in python(page):
        if name := re.match(r"# (\w+\.py)\n", code):
            (folder / name[1]).write_text(code)


def spans(page: Path) -> list[str]:
    """What stands in backticks within the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[list[str]]:
    """The words after `untether` of every command in a block or in backticks."""
    texts = [text for language, text in blocks(page) if language in ("", "sh", "bash", "console")] + spans(page)
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    found = [re.match(r"(?:\S*/)?untether (.+)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_the_expressions_above_find_what_there_is():
    assert sum(len(python(page)) for page in PAGES) >= 4 and sum(len(commands(page)) for page in PAGES) >= 30
    assert sum(len(named_fields(page)) for page in PAGES) >= 70
    assert {page.name for page in PAGES if python(page)} >= {
        "guide.md", "virtual-time.md", "run-directory.md", "studies.md"
    }  # fmt: skip


@each_page
def test_every_import_is_there(page):
    for code in python(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"


@each_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Beside a run directory `runs/main` with a round of a real timeline; what runs only leaves the scores of one."""
    monkeypatch.chdir(tmp_path)
    main = RunDirectory.create(Path("runs/main"), Experiment())
    virtual = timeline()
    events = pd.DataFrame(list(virtual.event_rows(run(virtual, 0, range(12))))).assign(seed=1, round=0)
    events.to_parquet(main.path / "events.parquet")
    for table in TABLES:
        if not (main.path / f"{table}.parquet").exists():
            pd.DataFrame({name: [] for name in TABLES[table].names}).to_parquet(main.path / f"{table}.parquet")
    scores = pd.DataFrame({"task": ["LaMP_2"], "arm": ["local"], "metric": ["accuracy"], "value": [0.5]})

    def carry_out(runs, progress, stop):
        for made in runs:
            for table in TABLES:
                pd.DataFrame({name: [] for name in TABLES[table].names}).to_parquet(made.path / f"{table}.parquet")
            scores.to_parquet(made.path / "metrics.parquet")
            made.commit(1, 0, {}, {"totals": {}})
            progress.begin(1, 0)
            progress.end()
            made.write_json("summary.json", {"rows": [{"task": "LaMP_2", "arm": "local", "reference": None}]})
            made.drop_parts()

    monkeypatch.setattr("untether.api.carry_out", carry_out)
    with apart():
        for code in python(page):
            exec(compile(code, page.name, "exec"), {"__name__": page.stem})


@each_page
def test_every_command_is_one(page):
    for words in commands(page):
        command, name = typer.main.get_command(app), "untether"
        words, said = list(words), f"{page.name}: untether {shlex.join(words)}"
        if words[0] in ("--install-completion", "--version"):  # the program's own
            continue
        while hasattr(command, "commands"):
            assert words and words[0] in command.commands, said
            name = words.pop(0)
            command = command.commands[name]
        if not words or "--help" in words:
            continue
        given = command.make_context(name, list(words)).params
        chosen = dict(pair.split("=", 1) for pair in given.get("set_") or ())
        grid = dict(pair.split("=", 1) for pair in given.get("grid") or ())
        assert set(chosen) - {"KEY"} <= KNOWN, said
        assert {axis for axis in grid if "." in axis} <= KNOWN, said
        if name == "run":
            example = str(given.get("experiment"))
            ours = ROOT / example if example.startswith("examples/") else None
            assert ours is None or ours.exists(), said
            Experiment.read(ours, {key: value for key, value in chosen.items() if key != "KEY"})
        if name == "study" and (ROOT / "sim/studies" / f"{given['name']}.toml").exists():
            Study.read(given["name"], chosen, grid)


@each_page
def test_toml_blocks_are_experiments_or_studies(page, tmp_path):
    write_files(page, tmp_path)
    with apart():
        for number, text in enumerate(text for language, text in blocks(page) if language == "toml"):
            if text.startswith("# node.toml"):
                (tmp_path / "node.toml").write_text(text)
                real = {"hardware.clock": "wall", "seeds": "1", "arms": "local,collaborative"}
                Node(tmp_path, 0).experiment(Experiment.read(None, real))
                continue
            (tmp_path / f"{number}.toml").write_text(text)
            read = Study.read if "[base]" in text else Experiment.read
            read(str(tmp_path / f"{number}.toml"))


@each_page
def test_run_configs_name_fields(page):
    for config in re.findall(r"--run-config '([^']*)'", page.read_text(encoding="utf-8")):
        given = dict(pair.split("=", 1) for pair in shlex.split(config))
        assert set(given) <= {"experiment", "set", "out", "resume", "nodes"}
        assert {word.split("=", 1)[0] for word in shlex.split(given.get("set", ""))} <= KNOWN


def named_fields(page: Path) -> list[tuple[str, str]]:
    """(span, word) of every `section.field` in backticks, perhaps with a value."""
    return [
        (span, word)
        for span in spans(page)
        for word in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w/(-])", span)
        if word.split(".")[0] in SECTIONS and not word.endswith((".json", ".toml", ".parquet", ".md", ".py"))
    ]


@each_page
def test_every_field_is_one(page):
    """And every `[section]`, and whatever `make` makes."""
    for span, word in named_fields(page):
        assert word in KNOWN | SECTIONS or word.startswith("by_arm."), f"{page.name}: `{span}`"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for line in [*spans(page), *(line for _, text in blocks(page) for line in text.splitlines())]:
        for target in re.findall(r"^make ([a-z-]+)", line.strip()):
            assert target in targets, f"{page.name}: make {target}"
    for span in spans(page):
        for word in re.findall(r"^\[([a-z_.]+)\]$", span):
            assert word in SECTIONS, f"{page.name}: `{span}`"


@each_page
def test_every_file_and_name_is_there(page):
    source = {
        path: path.read_text(encoding="utf-8") for part in HOUSE[:6] for path in (ROOT / part).rglob("*.py")
    }  # fmt: skip
    for span in spans(page):
        for word in re.findall(rf"(?<![\w./-])((?:{'|'.join(HOUSE)})/[\w./-]*)", span):
            assert (ROOT / word).exists(), f"{page.name}: `{span}`"
        for word in re.findall(rf"(?<![\w./-])((?:{'|'.join(HOUSE[:6])})(?:\.[a-z_0-9]+)+)(?![\w/])", span):
            assert resolves(word), f"{page.name}: `{span}`"
        for name, attribute in re.findall(r"\b([A-Z][A-Za-z]+)\.([a-z_]+)", span):
            ours = [text for text in source.values() if re.search(rf"^class {name}\b", text, re.M)]
            assert not ours or any(re.search(rf"^    (def )?{attribute}\b", text, re.M) for text in ours), span
        for name in re.findall(r"^([a-z_]+)\(\)$", span):
            assert any(re.search(rf"^ *def {name}\b", text, re.M) for text in source.values()), f"{page.name}: `{span}`"
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    if dotted.split(".")[0] in HOUSE[:4]:  # prose names a module without the import name
        dotted = f"untether.{dotted}"
    module, _, name = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:  # what stands before the last dot is no package: a module, or nothing
        pass
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False
