"""What one endpoint takes of a request. OpenAI's own parameters are many, and few others know them all.

A change is a word: the name of an optional parameter that is left out (`max_tokens` becomes `max_completion_tokens`
first), `system` where system text moves into the user's turn, `stream` where the answer is asked for as events.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

OPTIONAL = ("response_format", "seed", "top_p", "temperature", "system", "max_tokens")
"""What may be left out, the likeliest to be unknown first."""

_SPELLINGS = {
    "stream": r"only supports? stream|stream mode|non-?stream|must (?:be )?stream"
    r"|stream(?:ing)?\W{0,3} ?(?:is required|must be|\W{1,3}true)|stream\W{1,3}true",
    "system": r"system\W{0,3}(?:role|prompt|message|instruction|turn)s?|role\W{1,5}system\b|developer instruction"
    r"|roles? must alternate|must alternate|supports?\W{1,3}system\b",
    "response_format": r"response_?format|json_?schema|structured[ _]outputs?|guided_json|json mode|\bgrammar\b",
    "seed": r"(?<![a-z0-9_])seed(?![a-z0-9_])",
    "top_p": r"(?<![a-z0-9])top_?p(?![a-z0-9_])",
    "temperature": r"(?<![a-z0-9_])temperature(?![a-z0-9_])",
    "max_tokens": r"max_?(?:completion_?|output_?|new_?)?tokens",
}
_FINDS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _SPELLINGS.items()}


def named_change(text: str, parameter: str, parameters: Mapping[str, Any]) -> str:
    """Returns the change that an error's words ask for, empty where they name nothing that can be changed.

    Args:
        text: The endpoint's words.
        parameter: The field that it marks as the one at fault, if it does.
        parameters: Those of the request that was refused.
    """
    if parameter in _FINDS and parameter != "stream":
        return parameter if _has(parameter, parameters) else ""
    for name, find in _FINDS.items():
        if _has(name, parameters) and find.search(text):
            return name
    return ""


def _has(name: str, parameters: Mapping[str, Any]) -> bool:
    if name == "stream":
        return not parameters.get("stream")
    if name == "system":
        return any(message["role"] == "system" for message in parameters["messages"])
    if name == "max_tokens":
        return "max_tokens" in parameters or "max_completion_tokens" in parameters
    return name in parameters


class Dialect:
    """What is known of an endpoint so far: `changes`, in the order they were learned, and how many tokens it writes.

    Args:
        changes: Those that were learned before, as `told` gives them.
    """

    def __init__(self, changes: Iterable[str] = ()) -> None:
        self.changes: dict[str, None] = {}
        self.most_tokens: int | None = None
        for word in changes:
            name, _, number = word.partition("=")
            if name == "max_tokens" and number.isdigit():
                self.most_tokens = int(number)
            elif name in (*OPTIONAL, "stream", "max_completion_tokens"):
                self.changes[name] = None

    @property
    def told(self) -> list[str]:
        """All that was learned, as words."""
        return [*self.changes, *([f"max_tokens={self.most_tokens}"] if self.most_tokens else [])]

    def learn(self, change: str, parameters: Mapping[str, Any], text: str = "") -> None:
        """Heeds a change from now on. `text` are the endpoint's words, which may tell the most tokens it writes."""
        if change == "max_tokens":
            asked = parameters.get("max_tokens", parameters.get("max_completion_tokens", 0))
            fewer = [int(n) for n in re.findall(r"(?<![\d.])\d{2,7}(?![\d.])", text) if 16 <= int(n) < asked]
            rename = "max_completion_tokens" in text and "max_tokens" in parameters
            if fewer and not rename and self.most_tokens is None:
                self.most_tokens = max(fewer)
                return
            if "max_tokens" in self.changes:
                change = "max_completion_tokens"
        self.changes[change] = None

    def candidates(self, parameters: Mapping[str, Any]) -> list[str]:
        """Returns what the request still has that could be left out."""
        return [name for name in OPTIONAL if _has(name, parameters) and name != "max_tokens"]

    def spoken(self, parameters: Mapping[str, Any], also: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the parameters as this endpoint takes them, with further changes on trial."""
        changes = {*self.changes, *also}
        written = {name: value for name, value in parameters.items() if name not in changes}
        most = parameters["max_tokens"] if self.most_tokens is None else min(self.most_tokens, parameters["max_tokens"])
        written.pop("max_tokens", None)
        if "max_completion_tokens" not in changes:
            written["max_completion_tokens" if "max_tokens" in changes else "max_tokens"] = most
        if "system" in changes:
            written["messages"] = without_system(parameters["messages"])
        if "stream" in changes:
            written |= {"stream": True, "stream_options": {"include_usage": True}}
        return written


def without_system(messages: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Returns the messages with system text at the end of the last user's turn: what it asks for is then said last."""
    turns = [dict(message) for message in messages]
    told = [turn["content"] for turn in turns if turn["role"] == "system"]
    turns = [turn for turn in turns if turn["role"] != "system"]
    for turn in reversed(turns):
        if turn["role"] == "user":
            turn["content"] = "\n\n".join([turn["content"], *told])
            break
    return turns
