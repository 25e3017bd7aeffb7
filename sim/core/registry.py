"""Registries of everything that an experiment can name (filters, generators, strategies, analyses, ...).

A registry holds things by name: the built-in ones and those of plug-ins. What is registered as
`"package.module:attribute"` is imported on first use, so that naming it costs nothing, and the package that names it
need not import the package that defines it. `sim.core.kinds` has all registries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from untether.sim.core.errors import UserError, unknown

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A thing, the section of settings that it takes (a pydantic model; none: it takes none), and facts about it."""

    thing: Any
    settings: Any = None
    facts: Mapping[str, Any] | None = None


class Registry(Generic[T]):
    """Things of one kind by name. `Registry.of("filter")` is the registry of filters.

    Args:
        kind: What the things are, for messages and `Registry.of`.
        field: The experiment's field that names them, for messages; empty: they are named elsewhere too.
        built_in: A mapping, or the address of one or of what returns it, imported on first use.
        beside: Other values that the field may have.
        reserved: Names that no thing may have.
        facts: Facts that may be given when a thing is registered, with their defaults.
        values: Whether the things are values, which take no settings.
    """

    _kinds: dict[str, Registry[Any]] = {}

    def __init__(
        self, kind: str, field: str, built_in: Mapping[str, Any] | str, *, beside: Iterable[str] = (),
        reserved: Iterable[str] = (), facts: Mapping[str, Any] | None = None, values: bool = False,
    ):  # fmt: skip
        self.kind, self.field, self.values = kind, field, values
        self.beside, self.facts = tuple(beside), dict(facts or {})
        self._reserved = {*self.beside, *reserved}
        self._built_in = built_in
        self._added: dict[str, Any] = {}
        if kind in self._kinds:
            raise ValueError(f"a registry of kind `{kind}` exists already")
        self._kinds[kind] = self

    @classmethod
    def of(cls, kind: str) -> Registry[Any]:
        """Returns the registry of a kind.

        Raises:
            UserError: The kind is unknown; the message lists the known ones.
        """
        if kind not in cls._kinds:
            raise UserError(unknown("kind of plug-in", kind, cls._kinds))
        return cls._kinds[kind]

    @classmethod
    def sections(cls) -> dict[str, Any]:
        """Returns the sections of settings of all registered things, of every kind, by the things' names."""
        return {
            name: entry.settings
            for registry in cls._kinds.values() for name, entry in registry._added.items() if entry.settings
        }  # fmt: skip

    def register(self, name: str, thing: T | str, settings: Any = None, **facts: Any) -> None:
        """Registers a thing under a name.

        Args:
            name: Its name.
            thing: The thing, or its address.
            settings: The section of settings that it takes, if any.
            facts: Facts about it.

        Raises:
            ValueError: The name is taken (with settings: by a thing of any kind with settings), or the kind does not
                have these facts or settings.
        """
        if name in self or name in self._reserved:
            raise ValueError(f"{self.kind} `{name}` is registered already. Give it another name")
        if settings is not None and self.values:
            raise ValueError(f"{self.kind} `{name}`: this kind takes no settings")
        if settings is not None and name in self.sections():
            raise ValueError(f"something else with settings is registered as `{name}` already. Give it another name")
        for fact in facts:
            if fact not in self.facts:
                raise ValueError(f"{self.kind} `{name}`: {unknown('keyword', fact, ['settings', *self.facts])}")
        self._added[name] = Entry(thing, settings, facts)

    def check(self, name: str) -> None:
        """Checks that a name is registered.

        Raises:
            UserError: It is not; the message has the field and the known names.
        """
        if name not in self:
            where = f"{self.field}: " if self.field else ""
            raise UserError(f"{where}{unknown(self.kind, name, [*self.beside, *self])}")

    def get(self, name: str) -> T:
        """Returns the thing of that name. Raises UserError as `check` does."""
        thing = self._entry(name).thing
        return _imported(thing) if isinstance(thing, str) else thing

    def settings(self, name: str) -> Any:
        """Returns the section of settings of a thing, or None."""
        return self._entry(name).settings if name in self else None

    def fact(self, name: str, fact: str) -> Any:
        """Returns a fact about a thing, or the fact's default."""
        return (self._entry(name).facts or {}).get(fact, self.facts[fact])

    def bind(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> T:
        """Returns the thing, ready to be called: with a section of settings, it gets that as the keyword `settings`.

        Args:
            name: Its name.
            settings: The `[settings]` of an experiment: tables by name.
        """
        thing, section = self.get(name), self.settings(name)
        if section is None:
            return thing
        return functools.partial(thing, settings=section.model_validate(settings.get(name, {})))  # type: ignore

    @functools.cached_property
    def _first(self) -> dict[str, Entry]:
        """What is built in."""
        found = _imported(self._built_in) if isinstance(self._built_in, str) else self._built_in
        found = found() if callable(found) else found
        return {name: thing if isinstance(thing, Entry) else Entry(thing) for name, thing in found.items()}

    def _entry(self, name: str) -> Entry:
        self.check(name)
        return self._added[name] if name in self._added else self._first[name]

    def built_in(self) -> list[str]:
        """Returns the names that no plug-in brought."""
        return list(self._first)

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._first

    def __iter__(self) -> Iterator[str]:
        return iter([*self._first, *self._added])


def added() -> set[tuple[str, str]]:
    """Returns everything that plug-ins have registered by now, as (kind, name)."""
    return {(kind, name) for kind, registry in Registry._kinds.items() for name in registry._added}


@contextlib.contextmanager
def undone(always: bool = False) -> Iterator[None]:
    """Removes what is registered within the context if that ends in an error, or `always`."""
    before = {registry: dict(registry._added) for registry in Registry._kinds.values()}
    kept = False
    try:
        yield
        kept = not always
    finally:
        for registry, things in before.items():
            if not kept:
                registry._added = things


def _imported(address: str) -> Any:
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)
