"""JSON and TOML from elsewhere, read within bounds: what Python's reader takes beside the standard, and what would
exhaust memory or time, is a ValueError that says the place.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

MAX_DEPTH = 200
MAX_DIGITS = 40

_NO_NUMBER = re.compile(r"(?<=[\[:,\s])-?(?:NaN|Infinity)\b")


def loads(text: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: In UTF-8 where it is bytes; a byte order mark is skipped.
        max_depth: Most lists and objects within each other.

    Raises:
        ValueError: It is no JSON (`json.JSONDecodeError`), or nested deeper than that, or has a number of more than 40
            digits, or NaN or Infinity, which JSON does not have. The message begins with `line N: ` where it is known.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text.removeprefix("\ufeff"), parse_constant=_no_number, parse_int=_whole, parse_float=_real)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg} (column {error.colno})") from error
    except RecursionError:
        raise ValueError(f"it is nested deeper than {max_depth} lists and objects") from None
    except _NoNumber as error:
        found = _NO_NUMBER.search(str(text))
        where = f"line {str(text).count(chr(10), 0, found.start()) + 1}: " if found else ""
        raise ValueError(f"{where}{error} is no JSON value; write null, or leave the field out") from None
    if _deeper(value, max_depth):
        raise ValueError(f"it is nested deeper than {max_depth} lists and objects")
    return value


def toml(text: str) -> dict[str, Any]:
    """Returns the table of a TOML text. Raises `tomllib.TOMLDecodeError`, also for what is nested without end."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deep") from None


class _NoNumber(ValueError):
    pass


def _no_number(word: str) -> Any:
    raise _NoNumber(word)


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits ({digits[:12]}...) is more than anything here means")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:24]} is larger than can be told")
    return value


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested deeper than `depth`; level by level, so that it cannot itself run out."""
    level = [value]
    while level:
        if depth < 0:
            return True
        level = [
            inner for outer in level if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))
        ]  # fmt: skip
        depth -= 1
    return False
