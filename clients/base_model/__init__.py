"""The on-device base model: what `model.base` means, and the embedded one with what makes it (`pretrain`)."""

from __future__ import annotations

import os
from pathlib import Path

from untether.sim.core.errors import UserError
from untether.sim.core.package_data import find
from untether.sim.experiment.models.catalogue import catalogue, gguf_in

FOLDER = Path(__file__).parent
"""Where the committed checkpoint lies, as a Hugging Face model folder."""


def resolve(base: str) -> str:
    """Returns the name or path behind `model.base`.

    `embedded` is the committed checkpoint, a name of the catalogue the folder of the fetched model, a GGUF file (or a
    folder with one) its conversion in the user's cache, made unless it is there; anything else is unchanged. The
    environment variable UNTETHER_BASE_MODEL names another folder for `embedded`.

    Raises:
        UserError: There is no checkpoint, or the model is not fetched; the message has the command that mends it.
    """
    if base == "embedded":
        return _embedded()
    from untether.clients.base_model.gguf_folder import folder_of

    if model := catalogue().get(base):
        if not model.gguf.exists():
            raise UserError(f"model.base = `{base}` is not on this machine. Fetch it with: untether model fetch {base}")
        return str(folder_of(model.gguf, model.folder))
    gguf = gguf_in(Path(base).expanduser())
    return str(folder_of(gguf)) if gguf else base


def _embedded() -> str:
    try:
        return os.environ.get("UNTETHER_BASE_MODEL") or str(find("clients/base_model/config.json").parent)
    except FileNotFoundError as error:
        raise UserError(
            f"model.base = `embedded`: {error}. Install the package whole, set UNTETHER_BASE_MODEL to a checkpoint's "
            "folder, or make one with: untether model pretrain DIR"
        ) from None
