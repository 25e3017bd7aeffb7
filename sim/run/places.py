"""Finds the directory of a run by its id: a message names a run, never a folder.

The coordinator of a run announces it, and the hosts of the same machine, in processes of their own, look it up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from untether.sim.core.errors import UserError
from untether.sim.run.directory import RunDirectory


def run_id(run: RunDirectory) -> str:
    """Returns the id of a run in messages: of its place and its beginning, since nodes keep what they have of it."""
    started = (run.read_json("environment.json") or {}).get("started", "")
    return hashlib.blake2b(f"{run.path.resolve()} {started}".encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def announced(run: RunDirectory) -> Iterator[str]:
    """Makes a run's directory known to this machine's hosts while the context is open, and yields the run's id."""
    note = _folder() / run_id(run)
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    note.write_text(str(run.path.resolve()), encoding="utf-8")
    try:
        yield note.name
    finally:
        note.unlink(missing_ok=True)


def find_run(name: str) -> RunDirectory:
    """Returns the directory of an announced run.

    Raises:
        UserError: It was not announced on this machine.
    """
    try:
        return RunDirectory.open((_folder() / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"this node does not know the run {name}: hosts must live on the machine that coordinates the run, under "
            "the same user, with the same temporary folder (TMPDIR)"
        ) from None


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"untether-{os.getuid() if hasattr(os, 'getuid') else 'runs'}" / "runs"
