"""One reading of dates for every source: what is strictly earlier than what decides who may train on what."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

_YEAR = re.compile(r"^\d{4}$")
_MONTH = re.compile(r"^\d{4}-\d{2}$")
DAY_S = 86_400


def parse_date(value: object) -> float | None:
    """Seconds since 1970 (UTC) of a year, a month, an ISO day or a full ISO datetime; None for none or an empty string.

    A year or a month stands for its first instant, a datetime without zone for UTC. Numbers between 1000 and 9999 are
    years, other numbers seconds since 1970. Raises ValueError, saying what is accepted, for anything else.
    """
    if value is None or value == "":
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if not (1000 <= value <= 9999 and value == int(value)):
            return float(value)
        value = str(int(value))
    text = str(value).strip()
    if _YEAR.match(text):
        text += "-01-01"
    elif _MONTH.match(text):
        text += "-01"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{value!r} is no date: write YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def period(value: object) -> str:
    """How finely a date is given: "none", "year", "month", "day" or "instant".

    Two dates are compared at the coarser of their precisions, so that nothing of the same year counts as earlier than
    something known by its year alone.
    """
    if value is None or value == "":
        return "none"
    text = str(int(value)) if isinstance(value, (int, float)) and 1000 <= value <= 9999 else str(value).strip()
    if _YEAR.match(text):
        return "year"
    if _MONTH.match(text):
        return "month"
    return "day" if len(text) <= 10 else "instant"
