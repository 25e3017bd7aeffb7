"""The wheel: what is in it, and that it works where no checkout is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "untether/py.typed", "untether/clients/base_model/model.safetensors", "untether/clients/base_model/tokenizer.json",
    "untether/clients/base_model/chat_template.jinja", "untether/sim/population/world/banks/common.toml",
    "untether/sim/report/report.css", "untether/sim/report/report.html.jinja", "untether/sim/studies/scale.toml",
    "untether/sim/studies/study.html.jinja", "untether/sim/time/hardware.toml",
}  # fmt: skip
LOOK = """
import untether
from untether.clients.base_model import resolve
from untether.sim.core.package_data import find
from untether.sim.time.hardware import catalogue
print(*untether.__path__, resolve("embedded"), find("sim/studies/scale.toml"), *catalogue(), sep="\\n")
"""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str, cwd: Path) -> None:
    python("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by what is installed here: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(ROOT), cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


def test_one_import_name_with_its_data(wheel):
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"untether"} and len(tops) == 2
    assert DATA <= names
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_it_works_beside_others_and_without_the_checkout(wheel, tmp_path):
    place = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(place), str(wheel), cwd=tmp_path)
    assert {entry.name.split("-")[0] for entry in place.iterdir()} == {"untether", "bin"}
    found, model, study, *profiles = python("-P", "-c", LOOK, cwd=tmp_path, path=place).splitlines()
    assert found == str(place / "untether") and (Path(model) / "model.safetensors").is_relative_to(place)
    assert (Path(model) / "model.safetensors").is_file()
    assert Path(study).is_relative_to(place) and "pixel-8" in profiles
    assert "--resume" in python("-P", str(place / "bin" / "untether"), "run", "--help", cwd=tmp_path, path=place)
