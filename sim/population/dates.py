"""One parser of dates for every source: what is strictly earlier than what decides which items a model may train on."""

from __future__ import annotations

import math
import re
from calendar import monthrange
from datetime import UTC, date, datetime

from untether.sim.core.clock import DAY_S

_YEAR = re.compile(r"^\d{4}$")
_MONTH = re.compile(r"^\d{4}-\d{2}$")
_NUMBER = re.compile(r"^-?\d{9,}(?:\.\d*)?$")
"""Digits that are more than a day's eight: a moment as a number, in quotes."""

_EPOCH = date(1970, 1, 1).toordinal()


def parse_date(value: object) -> float | None:
    """Returns the seconds since 1970 (UTC) of a year, a month, an ISO day or a full ISO datetime.

    A year or a month is its first instant, a datetime without zone is in UTC. Numbers between 1000 and 9999 are years,
    other numbers seconds since 1970, up to the year 2200. None or an empty string gives None.

    Raises:
        ValueError: The value is anything else; the message has the accepted forms.
    """
    if value is None or value == "":
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if not (1000 <= value <= 9999 and value == int(value)):
            return _instant(float(value))
        value = str(int(value))
    text = str(value).strip()
    if _NUMBER.match(text):
        return _instant(float(text))
    if _YEAR.match(text):
        text += "-01-01"
    elif _MONTH.match(text):
        text += "-01"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{value!r} is no date: write YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_LATEST = datetime(2200, 1, 1, tzinfo=UTC).timestamp()
_EARLIEST = datetime(1, 1, 2, tzinfo=UTC).timestamp()
_SCALES = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}


def _instant(value: float) -> float:
    """Seconds since 1970, where a number is such; pandas and JavaScript count finer, which is told, not guessed."""
    if _EARLIEST <= value <= _LATEST:
        return value
    finer = next((name for name, scale in _SCALES.items() if _EARLIEST <= value / scale <= _LATEST), "")
    hint = f"; it reads as {finer}: divide by {_SCALES[finer]:.0f}" if finer else ""
    raise ValueError(f"{value:g} is no number of seconds since 1970 in the years 1 to 2200{hint}")


def date_span(value: object) -> tuple[float | None, float | None]:
    """Returns (begin, end) in seconds since 1970 (UTC) of all the days that a date may mean.

    The begin is `parse_date`'s. The end is None unless the date is coarser than a day (a month, a year): a day ends at
    its next midnight. It is (None, None) without a date. Raises ValueError as `parse_date` does.
    """
    key = calendar_key(value)
    coarse = 0 < len(key) < 3
    return parse_date(value), (last_day(key) + 1 - _EPOCH) * DAY_S if coarse else None


def calendar_key(value: object) -> tuple[int, ...]:
    """Returns (year,), (year, month) or (year, month, day) in UTC, as finely as the date is given; () without a date.

    A day is the finest: items of the same day have no reliable order. Raises ValueError as `parse_date` does.
    """
    time_s = parse_date(value)
    if time_s is None:
        return ()
    moment = datetime.fromtimestamp(time_s, UTC)
    text = str(value).strip()
    parts = 1 if _YEAR.match(text) else 2 if _MONTH.match(text) else 3
    return (moment.year, moment.month, moment.day)[:parts]


def first_day(key: tuple[int, ...]) -> int:
    """Returns the first day that a calendar key may mean, counted from the year 1."""
    year, month, day = (*key, 1, 1)[:3]
    return date(year, month, day).toordinal()


def last_day(key: tuple[int, ...]) -> int:
    """Returns the last day that a calendar key may mean: `strictly_earlier(a, b)` is `last_day(a) < first_day(b)`."""
    year, month = (*key, 12)[:2]
    return date(year, month, key[2] if len(key) > 2 else monthrange(year, month)[1]).toordinal()


def strictly_earlier(key: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Returns whether one calendar key is surely before another, compared at the coarser of both; False without a date.

    So nothing of the same year counts as earlier than something known by its year alone.
    """
    known = min(len(key), len(other))
    return key[:known] < other[:known]
