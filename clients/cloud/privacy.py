"""What a device keeps from the cloud: items it does not show, fields it leaves empty, and what it masks in the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.core.seeding import generator
from untether.sim.experiment.privacy import Privacy
from untether.sim.prompts.protocol import Mask

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"']{1,2048}", re.IGNORECASE)
_HANDLE = re.compile(r"(?<![\w@/.])@\w{2,30}")


def shown_items(items: Sequence[Interaction], privacy: Privacy, seed: int, device_id: str) -> list[Interaction]:
    """Returns the items of one task that may be shown, in their order, without the fields that never are.

    Raises UserError where the file of tagged items cannot be read.
    """
    chosen = list(items)
    if privacy.share == "latest":
        chosen = chosen[-privacy.share_items :]
    elif privacy.share == "random":
        chosen = [
            item for item in chosen
            if generator(seed, device_id, item.item_id, item.task, "share").random() < privacy.share_part
        ]  # fmt: skip
    elif privacy.share == "tagged":
        tagged = _tagged(privacy.tagged)
        chosen = [item for item in chosen if item.item_id in tagged]
    return [replace(item, **dict.fromkeys(privacy.never, "")) for item in chosen] if privacy.never else chosen


def masking(privacy: Privacy) -> Mask:
    """Returns what masks a text: the longest things first, so that an address is no handle."""
    kinds = privacy.redact
    names = _names(privacy.names) if "name" in kinds else None

    def mask(text: str) -> tuple[str, int]:
        count = 0
        for kind, find in (("url", _URL), ("email", _EMAIL), ("handle", _HANDLE)):
            if kind in kinds:
                text, found = find.subn(f"[{kind}]", text)
                count += found
        if "phone" in kinds:
            text, found = _without_phones(text, privacy.region)
            count += found
        if names is not None:
            text, found = names.subn("[name]", text)
            count += found
        return text, count

    return mask


def _without_phones(text: str, region: str) -> tuple[str, int]:
    import phonenumbers

    found = list(phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.POSSIBLE))
    for match in reversed(found):
        text = f"{text[: match.start]}[phone]{text[match.end :]}"
    return text, len(found)


def _names(names: Sequence[str]) -> re.Pattern[str]:
    words = sorted({name.strip() for name in names if name.strip()}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


@lru_cache(maxsize=4)
def _tagged(path: str) -> frozenset[str]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"privacy.tagged = {path!r}: cannot be read ({error}). Give a file of item ids, one a line"
        ) from error
    return frozenset(line.strip() for line in text.splitlines() if line.strip())
