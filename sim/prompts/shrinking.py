"""A request that is longer than a model's context, with less of the user's history in it: for who serves the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_BEGIN, _END = "one JSON object a line:\n", "End of samples.\n"
_LEAST_CHARS = 80
"""Of a text that is cut, so much is left."""


def shrunk(messages: Sequence[dict[str, Any]], share: float) -> tuple[list[dict[str, Any]], int] | None:
    """Returns the chat with about `share` of what it shows of the user, the oldest items left out, or the only one cut;
    and how many items are left out or cut. None where there is nothing (more) to leave out, as in a chat that is no
    request of `sim.prompts.protocol`.
    """
    place = max((n for n, message in enumerate(messages) if message.get("role") == "user"), default=None)
    text = messages[place].get("content") if place is not None else None
    if place is None or not isinstance(text, str):
        return None
    before, begin, rest = text.partition(_BEGIN)
    shown, end, after = rest.partition(_END)
    lines = [line for line in shown.split("\n") if line.strip()]
    if not begin or not end or not lines:
        return None
    room = max(0, int(share * len(text)) - len(text) + len(shown))
    kept: list[str] = []
    for line in lines:  # the newest first
        if sum(map(len, kept)) + len(kept) + len(line) > room:
            break
        kept.append(line)
    left_out = len(lines) - len(kept)
    if not kept:
        cut = _cut(lines[0], room)
        if cut is None and len(lines) == 1:
            return None
        kept, left_out = [cut or lines[0]], len(lines) if cut else len(lines) - 1
    changed = {**messages[place], "content": f"{before}{begin}" + "\n".join(kept) + f"\n{end}{after}"}
    return [*messages[:place], changed, *messages[place + 1 :]], left_out


def _cut(line: str, room: int) -> str | None:
    """An item with less of its input, so that its line is about `room` long; None where it is short already."""
    try:
        item = json.loads(line)
        text = item["input"]
    except (ValueError, KeyError, TypeError):
        return None
    kept = max(_LEAST_CHARS, len(text) - (len(line) - room) - 1)
    if kept >= len(text):
        return None
    return json.dumps({**item, "input": text[:kept]}, ensure_ascii=False)
