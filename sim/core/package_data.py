"""Finds the package's data files (weights, templates), also from inside a Flower app bundle, which has none."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import untether


def import_root() -> Path:
    """Returns the folder that `untether` is imported from, which our child processes need on their path."""
    return Path(untether.__file__).resolve().parent.parent


def find(relative: str) -> Path:
    """Returns the path of a data file or folder, given relative to the package, such as `clients/base_model`.

    Looks in the imported package first, then where the distribution is installed (an editable install: its checkout).

    Raises:
        FileNotFoundError: It is in neither place; the message names both.
    """
    places = [*map(Path, untether.__path__), *_installed()]
    for place in places:
        if (place / relative).exists():
            return place / relative
    raise FileNotFoundError(f"{relative} is in none of {', '.join(map(str, places))}")


def _installed() -> list[Path]:
    try:
        distribution = importlib.metadata.distribution("untether")
    except importlib.metadata.PackageNotFoundError:
        return []
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    checkout = [Path(unquote(urlsplit(origin).path))] if origin.startswith("file://") else []
    return [*checkout, Path(str(distribution.locate_file("untether")))]
