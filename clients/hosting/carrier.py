"""Files of a run for workers that do not see its directory: carried there with a call, and back with its reply.

Such a worker works in a folder of its own, a mirror that holds what the call may read and nothing else. What it writes
there comes back with its reply, and an adapter that it found superseded is deleted at home too. Files travel as values
of Ray's object store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from untether.clients.device.device import Shard
from untether.sim.population.source import device_id
from untether.sim.run.directory import write_bytes_atomically

EXPERIMENT = "experiment.toml"
CARRIED_BACK = ("state/parts", "adapters")
"""Where workers write what counts. Progress and a cache of answers stay where they are."""

PREFIX = "untether-worker-"
"""Of a mirror's name; the id of its process follows."""

ORDERED = ("sample_parts", "answer_parts")
"""Entries of an order that name files."""

Files = dict[str, bytes]
"""By path, relative to the run directory."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A worker's reply, the files that it wrote and those that it deleted."""

    reply: Any
    written: Files
    deleted: tuple[str, ...]


def needed(run: Path, arguments: Sequence[Any]) -> Files:
    """The files that a call may read: the experiment, parts that its order names, adapters of its shard's devices and
    those that all share.
    """
    names = [EXPERIMENT]
    for argument in arguments:
        if isinstance(argument, Shard):
            names += _adapters(run, argument)
        elif isinstance(argument, Mapping):
            names += [name for entry in ORDERED for name in argument.get(entry, ())]
    return {name: (run / name).read_bytes() for name in names}


def digests(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What tells two contents of a file apart."""
    return {name: hashlib.blake2b(content, digest_size=16).digest() for name, content in files.items()}


def bring_home(run: Path, parcel: Parcel) -> Any:
    """Puts what a worker wrote into the run directory and returns its reply. Raises ResumableStop on a full disk."""
    for name, content in parcel.written.items():
        write_bytes_atomically(run / name, content)
    for name in parcel.deleted:
        (run / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            (run / name).parent.rmdir()
            (run / name).parent.parent.rmdir()
    return parcel.reply


class Mirror:
    """A worker's stand-in for a run directory that it does not see."""

    def __init__(self) -> None:
        _sweep()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, True)

    def close(self) -> None:
        """Deletes the folder."""
        self._end()

    def lacking(self, wanted: Mapping[str, bytes]) -> list[str]:
        """Which of these files (by digest) are not there. All others are deleted."""
        there = {name: path.read_bytes() for name, path in self._files("")}
        held = {name for name, digest in digests(there).items() if wanted.get(name) == digest}
        for name in there.keys() - held:
            (self.path / name).unlink()
        return [name for name in wanted if name not in held]

    def take(self, files: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Lays down files. Returns what `parcel` compares with."""
        for name, content in files.items():
            write_bytes_atomically(self.path / name, content)
        return self._state()

    def parcel(self, reply: Any, before: Mapping[str, tuple[int, int]]) -> Parcel:
        """A call's reply with all that it changed since `before`."""
        after = self._state()
        written = {name: (self.path / name).read_bytes() for name in after if after[name] != before.get(name)}
        return Parcel(reply, written, tuple(sorted(before.keys() - after.keys())))

    def _state(self) -> dict[str, tuple[int, int]]:
        """Which file each name holds: one that is written again is another file."""
        found = [(name, path.stat()) for folder in CARRIED_BACK for name, path in self._files(folder)]
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}

    def _files(self, folder: str) -> Iterator[tuple[str, Path]]:
        for path in sorted((self.path / folder).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(self.path)), path


def _sweep() -> None:
    """Deletes what killed workers have left of theirs."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        try:
            os.kill(int(path.name.removeprefix(PREFIX).split("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # not ours


def _adapters(run: Path, shard: Shard) -> Iterator[str]:
    """Files of adapters that a shard's devices have, or that are nobody's (`shared`)."""
    mine = {device_id(index) for index in shard.devices}
    for path in sorted((run / "adapters" / f"seed-{shard.seed}").glob("*/*/*.safetensors")):
        with contextlib.suppress(FileNotFoundError), safe_open(path, framework="numpy") as file:
            devices = json.loads(file.metadata()["devices"])
            if path.parent.name == "shared" or not mine.isdisjoint(devices):
                yield str(path.relative_to(run))
