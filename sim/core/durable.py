"""Files that are on the disk once they have their name: what a commit names must outlive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def settle(temporary: Path, target: Path) -> None:
    """Gives a written file its name, both on the disk when this returns. Raises OSError."""
    _flush(temporary)
    os.replace(temporary, target)
    _flush(target.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it that are missing, each on the disk when this returns. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """A file's content, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
