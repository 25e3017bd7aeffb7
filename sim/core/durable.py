"""Durable files: a file is on the disk once it has its name, since what a commit names must outlive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from untether.sim.core.errors import ResumableStop, UserError, disk_is_full
from untether.sim.core.text import shown


def possible(path: str | Path) -> Path:
    """Returns the path. Raises UserError where no file can have this name, whether or not there is one."""
    try:
        os.lstat(path)
    except (ValueError, OSError) as error:
        name_error = isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
        if name_error:
            raise UserError(f"{shown(str(path), 80)}: no file can have this name ({shown(str(error), 60)})") from None
    return Path(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one. Raises as `written` does."""
    with written(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that no other user of this machine may read, whole or not at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    os.replace(fresh, path)


@contextlib.contextmanager
def written(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path`, whole and on the disk, when the block ends.

    Args:
        path: The file.
        errors: Errors that a library raises instead of an OSError.

    Raises:
        ResumableStop: Writing fails; no half-written file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        make_folder(path.parent)
        yield temporary
        settle(temporary, path)
    except failures as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ResumableStop(cannot_write(path, error)) from error


def cannot_write(path: str | Path, error: BaseException) -> str:
    """Returns the message to the user when a file of a run could not be written."""
    advice = "Free some space" if disk_is_full(error) else "See to it"
    return f"cannot write {path}: {getattr(error, 'strerror', None) or error}. {advice}, then resume the run."


def settle(temporary: Path, target: Path) -> None:
    """Renames a written file to its final name, both on the disk when this returns. Raises OSError."""
    _flush(temporary)
    os.replace(temporary, target)
    _flush(target.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents, each on the disk when this returns. Raises OSError."""
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
