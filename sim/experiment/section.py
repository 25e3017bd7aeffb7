"""Section: the base class of every table of an experiment."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen table of the experiment; unknown keys are refused, with the nearest known one in the message."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
