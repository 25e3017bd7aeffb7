"""The vocabulary of the world: readable English in small TOML files, loaded once and found again in a text."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def bank(name: str) -> dict[str, Any]:
    """Returns the parsed word bank `banks/<name>.toml`."""
    return tomllib.loads((files(__package__) / "banks" / f"{name}.toml").read_text(encoding="utf-8"))


def split(text: str, separator: str = ";") -> tuple[str, ...]:
    """Splits a bank's string into its items."""
    return tuple(item.strip() for item in text.split(separator) if item.strip())


def rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Splits a bank's block into lines, and each at `|`."""
    return tuple(split(line, "|") for line in text.strip().splitlines())


def common(name: str) -> tuple[str, ...]:
    """Returns a bank that several tasks draw from: first, town, job, trait, day."""
    return split(bank("common")[name], ",")


def pick(rng: Random, items: tuple[T, ...] | list[T]) -> T:
    """Returns one item, uniformly, from one `random()` call (so that streams stay stable across Python versions)."""
    return items[int(rng.random() * len(items))]


def pick_distinct(rng: Random, items: tuple[T, ...] | list[T], count: int) -> list[T]:
    """Returns `count` different items in random order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def capital(text: str) -> str:
    """Returns `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    """Returns the article of a noun, `a` or `an`."""
    return "an" if noun[0] in "aeiou" or noun.startswith("hon") else "a"


class Finder:
    """Finds known phrases in a text, in order of appearance; `phrases` maps each phrase to its value."""

    def __init__(self, phrases: dict[str, Any]) -> None:
        self._by_first: dict[str, list[tuple[str, Any]]] = {}
        for phrase, value in phrases.items():
            self._by_first.setdefault(phrase.lower().split()[0], []).append((phrase.lower(), value))
        for found in self._by_first.values():
            found.sort(key=lambda pair: -len(pair[0]))

    def find(self, text: str) -> list[Any]:
        """Returns the values of all phrases in `text`, longest match first at each word."""
        low = text.lower()
        values = []
        at = 0
        while at < len(low):
            end = at
            while end < len(low) and (low[end].isalnum() or low[end] in "-'"):
                end += 1
            if end > at:
                for phrase, value in self._by_first.get(low[at:end], ()):
                    if low.startswith(phrase, at):
                        values.append(value)
                        end = at + len(phrase)
                        break
            at = end + 1
        return values
