"""Section: what every table of an experiment is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen table of the experiment; unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
