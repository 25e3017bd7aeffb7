"""Registries: what an experiment can name (filters, generators, strategies, analyses, ...), and who makes it.

A registry holds things by name: the built-in ones and those of plug-ins. Whatever is registered as
`"package.module:attribute"` is imported when it is first asked for, so that naming it costs nothing, and so that the
room that names it need not know the room that makes it. `sim.core.kinds` has them all.
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
    """Things of one `kind` by name. `field` is where an experiment names them, for messages (none: they are
    named elsewhere too).

    `built_in` is a mapping, or the address of one or of what returns it, imported when it is first needed. `beside`:
    names that the field may have and that are no things here; `reserved`: names that no thing may have. `facts` are
    what may be said of a thing as it is registered, with their defaults. `values`: the things take no settings.

    Registries are known by kind themselves: `Registry.of("filter")` is the one of the filters.
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
        """The registry of that kind. Raises UserError, which lists the known kinds."""
        if kind not in cls._kinds:
            raise UserError(unknown("kind of plug-in", kind, cls._kinds))
        return cls._kinds[kind]

    @classmethod
    def sections(cls) -> dict[str, Any]:
        """The sections of settings of all registered things, of whatever kind, by the things' names."""
        return {
            name: entry.settings
            for registry in cls._kinds.values() for name, entry in registry._added.items() if entry.settings
        }  # fmt: skip

    def register(self, name: str, thing: T | str, settings: Any = None, **facts: Any) -> None:
        """Makes a thing known by name. Raises ValueError where the name is taken (of one with settings: by whatever
        kind has settings), and for what this kind does not have.
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
        """Raises UserError, naming the field and the known names, for a name that nobody registered."""
        if name not in self:
            where = f"{self.field}: " if self.field else ""
            raise UserError(f"{where}{unknown(self.kind, name, [*self.beside, *self])}")

    def get(self, name: str) -> T:
        """The thing of that name. Raises UserError as `check` does."""
        thing = self._entry(name).thing
        return _imported(thing) if isinstance(thing, str) else thing

    def settings(self, name: str) -> Any:
        """The section of settings of a thing; None where it has none."""
        return self._entry(name).settings if name in self else None

    def fact(self, name: str, fact: str) -> Any:
        """What was said of a thing, or the default."""
        return (self._entry(name).facts or {}).get(fact, self.facts[fact])

    def bind(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> T:
        """The thing, to be called: where it has a section of settings, it gets that as the keyword `settings`, made of
        the table of its name (the `[settings]` of an experiment).
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

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._first

    def __iter__(self) -> Iterator[str]:
        return iter([*self._first, *self._added])


def added() -> set[tuple[str, str]]:
    """All that plug-ins have registered by now, as (kind, name)."""
    return {(kind, name) for kind, registry in Registry._kinds.items() for name in registry._added}


@contextlib.contextmanager
def undone(always: bool = False) -> Iterator[None]:
    """Forgets what is registered within, if that ends in an error (or `always`)."""
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
