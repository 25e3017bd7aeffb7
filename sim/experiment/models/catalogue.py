"""Which pretrained models can be named, what they are made of, and where they lie on this machine once fetched."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from untether.sim.core.errors import UserError, unknown

EMBEDDED = "embedded"
"""`model.base` of the model that comes with the package: the defaults of `[training]` are its own."""

GENERAL = {"learning_rate": 1e-3, "epochs": 3.0}
"""Of `[training]`, for models of which the catalogue says nothing: a pretrained model needs a third of the embedded
one's rate. `untether tune` finds what suits one.
"""

Role = Literal["device", "generator"]


class KnownModel(BaseModel):
    """A model of the catalogue.

    `wheels`: (requirement, sha256) of the packages that carry it, in the order in which their data are joined; `bytes`
    and `sha256` are those of the GGUF file that comes out. `training`: fields of `[training]` that suit its adapters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    licence: str
    licence_note: str = ""
    parameters: int = Field(gt=0)
    roles: tuple[Role, ...] = ("device", "generator")
    template: bool = True
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    wheels: tuple[tuple[str, str], ...] = Field(min_length=1)
    training: dict[str, Any] = {}

    @property
    def gguf(self) -> Path:
        """Where its GGUF file lies once it is fetched."""
        return models_folder() / f"{self.name}.gguf"

    @property
    def folder(self) -> Path:
        """Where it lies in the form that `AutoModelForCausalLM.from_pretrained` loads."""
        return models_folder() / self.name


def models_folder() -> Path:
    """Returns where models are kept: `models` in UNTETHER_CACHE, or in the user's cache folder."""
    own = os.environ.get("UNTETHER_CACHE")
    if own:
        return Path(own).expanduser() / "models"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "untether" / "models"


def catalogue() -> Mapping[str, KnownModel]:
    """Returns all models by name: the built-in ones, then those of the TOML files that UNTETHER_MODELS names.

    Raises UserError, naming file and place, for a file that is none or a name that is taken.
    """
    return _read(os.environ.get("UNTETHER_MODELS", ""))


def training_of(base: str) -> Mapping[str, Any]:
    """Returns the fields of `[training]` that suit adapters of this `model.base` better than the defaults."""
    if base == EMBEDDED:
        return {}
    found = catalogue().get(base)
    return found.training if found is not None and found.training else GENERAL


def known(name: str) -> KnownModel:
    """Returns the model of that name. Raises UserError, which lists those that there are."""
    found = catalogue()
    if name not in found:
        raise UserError(unknown("model", name, found))
    return found[name]


def gguf_in(path: Path) -> Path | None:
    """Returns the GGUF file that a path means: itself, or the only one in a folder that is no Hugging Face folder; else
    None.

    Raises UserError for a folder with several.
    """
    if path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} holds several GGUF files ({names}): name one of them")
    return found[0] if found else None


@cache
def _read(more: str) -> dict[str, KnownModel]:
    files = [Path(__file__).with_name("catalogue.toml"), *map(Path, filter(None, more.split(os.pathsep)))]
    found: dict[str, KnownModel] = {}
    for file in files:
        try:
            tables = tomllib.loads(file.expanduser().read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"UNTETHER_MODELS: {file} is no catalogue of models: {error}") from None
        for name, table in tables.items():
            if name in found:
                raise UserError(f"{file}: there is a model `{name}` already. Give this one another name")
            try:
                found[name] = KnownModel.model_validate({"name": name, **table})
            except (ValidationError, TypeError) as error:
                raise UserError(f"{file}, [{name}]: {_first(error)}") from None
    return found


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "this must be a table"
    item = error.errors()[0]
    return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
