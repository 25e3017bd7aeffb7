"""The embedded on-device model: weights, tokenizer, model card, and what makes them (`pretrain`)."""

from __future__ import annotations

import os
from pathlib import Path

from untether.sim.core.errors import UserError
from untether.sim.core.package_data import find

FOLDER = Path(__file__).parent
"""Where the committed checkpoint lies, as a Hugging Face model folder."""


def resolve(base: str) -> str:
    """Returns the name or path behind `model.base`: `embedded` is the committed checkpoint, anything else is unchanged.

    The environment variable UNTETHER_BASE_MODEL names another folder for `embedded`.

    Raises:
        UserError: There is no checkpoint.
    """
    if base != "embedded":
        return base
    try:
        return os.environ.get("UNTETHER_BASE_MODEL") or str(find("clients/base_model/config.json").parent)
    except FileNotFoundError as error:
        raise UserError(
            f"model.base = `embedded`: {error}. Install the package whole, set UNTETHER_BASE_MODEL to a checkpoint's "
            "folder, or make one with: untether model pretrain DIR"
        ) from None
