"""What of a user's history a device shows to the cloud: the experiment's section on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from untether.sim.experiment.section import Section


class Privacy(Section):
    """What of a user's history may leave the device for the cloud; what is kept back is trained on all the same."""

    redact: tuple[Literal["email", "phone", "handle", "url", "name"], ...] = Field(
        (), description="what is masked in every text before it is uploaded, and counted in the ledger: email, phone, "
        "handle, url, name"
    )
    names: tuple[str, ...] = Field((), description="the names that `name` masks, in any case")
    region: str = Field("US", description="where phone numbers without a country code are from (ISO 3166)")
    share: Literal["all", "latest", "random", "tagged"] = Field(
        "all", description="which history items may be shown: all, the latest `share_items` of a task, a random "
        "`share_part`, or those that the user tagged (`tagged`)"
    )
    share_items: int = Field(8, ge=1, description="latest: how many items a task")
    share_part: float = Field(0.5, gt=0, le=1, description="random: the chance of each item, drawn once for ever")
    tagged: str = Field("", description="tagged: a file with the ids of the items that may be shown, one a line")
    never: tuple[Literal["input", "output"], ...] = Field(
        (), description="fields of a history item that are never shown"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Privacy:
        if "name" in self.redact and not any(name.strip() for name in self.names):
            raise ValueError('redact has "name" and names is empty: list the names that are to be masked')
        if self.share == "tagged" and not self.tagged:
            raise ValueError('share = "tagged" needs privacy.tagged, a file with item ids, one a line')
        if len(set(self.never)) == 2:
            raise ValueError('never = ["input", "output"] leaves nothing to show. Name one of them')
        return self
