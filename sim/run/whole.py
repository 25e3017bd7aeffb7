"""Reading what a run has on disk: whole, or one sentence that names the file. Never a part of it, never another number.

A disk that was full, a copy that was cut, a machine that lost power: any file of a run may be damaged. And a run
directory may be a stranger's, who may have put links in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from untether.sim.core import strict_json
from untether.sim.core.errors import UserError
from untether.sim.core.text import shown

REMEDY = "Put it back from a copy, or start the run anew in another directory"


def damaged(path: Path, error: BaseException | str) -> UserError:
    """Returns what a user is told of a file that cannot be read."""
    return UserError(f"{path}: this file of the run is damaged ({shown(str(error), 160)}). {REMEDY}")


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file. Raises UserError where it is gone or damaged."""
    try:
        return strict_json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: this file of the run is gone. {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_table(path: Path, **options: Any) -> pa.Table:
    """Returns a Parquet file as a table, its pages checked against their sums. Raises UserError where it is gone or
    damaged.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: this file of the run is gone. {REMEDY}") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def is_whole(path: Path) -> bool:
    """Returns whether a Parquet file can be read to its end."""
    try:
        read_table(path)
    except UserError:
        return False
    return True


def commit_of(path: Path) -> dict[str, Any]:
    """Returns a commit's content. Raises UserError where it is damaged or names files outside of its run."""
    found = read_json(path)
    parts = found.get("parts") if isinstance(found, dict) else None
    if not isinstance(parts, dict) or not isinstance(found.get("facts"), dict):
        raise damaged(path, "it has no parts and facts")
    for names in parts.values():
        for name in names if isinstance(names, list) else [None]:
            if not isinstance(name, str) or not _below(name, "state/parts/"):
                raise damaged(path, f"it names {name!r}, which is no part of this run")
    return found


def _below(name: str, folder: str) -> bool:
    return name.startswith(folder) and os.path.normpath(name) == name and not os.path.isabs(name)


def refuse_links(root: Path, names: Sequence[str]) -> None:
    """Raises UserError where a file or folder that is to be written below `root` is a link: it may lead anywhere."""
    for name in names:
        place = root / name
        inside = [Path(folder) / one for folder, folders, files in os.walk(place) for one in (*folders, *files)]
        for found in (place, *inside):
            if found.is_symlink():
                raise UserError(f"{found} is a link, and a run directory is written to where it lies. Remove the link")


def refuse_code(path: Path) -> None:
    """Raises UserError where a run's experiment names a plug-in by a path that untether never writes: one within the
    run directory, or one that is found from there. Whoever looks at a stranger's run must not run its code.
    """
    try:
        names = strict_json.toml(path.read_text(encoding="utf-8")).get("plugins")
    except (OSError, ValueError):
        return  # told by who reads it
    for name in names if isinstance(names, list) else ():
        place = Path(name) if isinstance(name, str) and name.endswith(".py") else None
        if place and not (place.is_absolute() and not place.resolve().is_relative_to(path.parent.resolve())):
            raise UserError(
                f"{path}: plugins names {shown(name, 80)!r}, code that came with the run directory, and plug-ins are "
                "run when they are named. Read it; if you trust it, put it elsewhere and write its absolute path"
            )


def plain_name(name: object, what: str, path: Path) -> str:
    """Returns a name out of a run's tables that becomes a file's. Raises UserError for one that would lead elsewhere.
    """
    fine = isinstance(name, str) and name and name[0] != "." and all(c.isalnum() or c in "-_." for c in name)
    if not fine or not isinstance(name, str):
        raise UserError(f"{path}: {what} {shown(str(name), 60)!r} is no name that untether gives. The table is damaged")
    return name


def to_json(value: Any) -> str:
    """Returns JSON as files of a run have it."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
