"""The embedded on-device model: weights, tokenizer, model card, and what makes them (`pretrain`)."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sim.errors import UserError

FOLDER = Path(__file__).parent
"""Where the committed checkpoint lies, as a Hugging Face model folder."""


def resolve(base: str) -> str:
    """The name or path behind `model.base`: `embedded` is the committed checkpoint, anything else is left as it is.

    Inside an app bundle of Flower, which carries no weights, the checkpoint of the installed package is used, or the
    folder in the environment variable UNTETHER_BASE_MODEL. Raises UserError where none is found.
    """
    if base != "embedded":
        return base
    folders = [os.environ.get("UNTETHER_BASE_MODEL", ""), FOLDER, *_installed()]
    for folder in folders:
        if folder and (Path(folder) / "config.json").is_file():
            return str(folder)
    raise UserError(
        f"model.base = `embedded`: no checkpoint in {FOLDER}. Install the package whole, set UNTETHER_BASE_MODEL to "
        "the folder of a checkpoint, or make one with: untether model pretrain DIR"
    )


def _installed() -> list[Path]:
    """Where the installed distribution keeps this package (an editable install: its checkout)."""
    try:
        distribution = importlib.metadata.distribution("untether")
    except importlib.metadata.PackageNotFoundError:
        return []
    places = [Path(str(distribution.locate_file("clients/base_model")))]
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    if origin.startswith("file://"):
        places.append(Path(unquote(urlsplit(origin).path)) / "clients" / "base_model")
    return places
