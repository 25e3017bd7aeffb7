"""Text from elsewhere: made valid, and made harmless where it is shown."""

from __future__ import annotations

import re

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters (a terminal's escape sequences begin with one) and those that turn the direction of writing."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def valid(text: str) -> str:
    """Returns `text` as valid Unicode: surrogate pairs joined, lone surrogates, which UTF-8 cannot carry, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(text: str) -> str:
    """Returns `text` as valid Unicode without control characters but line breaks and tabs: what a model may have
    written that is no text.
    """
    return _CONTROL.sub("", valid(text))


def shown(text: str, limit: int | None = None) -> str:
    """Returns `text` as a line of a terminal or a table may show it: white space made single, control characters
    visible as escapes, at most `limit` characters.
    """
    line = " ".join(_UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", valid(_breaks(text))).split())
    return line if limit is None or len(line) <= limit else line[:limit] + "..."


def _breaks(text: str) -> str:
    return re.sub(r"[\t\n\r\x0b\x0c\u2028\u2029]", " ", text)
