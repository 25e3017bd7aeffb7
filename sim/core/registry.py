"""Registries: what an experiment can name (filters, generators, strategies, analyses, ...), and who makes it.

A registry holds things by name: the built-in ones and those of plug-ins. Whatever is registered as
`"package.module:attribute"` is imported when it is first asked for, so that naming it costs nothing, and so that the
room that names it need not know the room that makes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from untether.sim.core.errors import UserError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one `kind` by name. `field` is where an experiment names them, for messages (none: they are
    named elsewhere too).

    Registries are known by kind themselves: `Registry.of("filter")` is the one of the filters.
    """

    _kinds: dict[str, Registry[Any]] = {}

    def __init__(self, kind: str, field: str, built_in: Mapping[str, T | str] | None = None):
        self.kind, self.field = kind, field
        self._things: dict[str, T | str] = dict(built_in or {})
        if kind in self._kinds:
            raise ValueError(f"a registry of kind `{kind}` exists already")
        self._kinds[kind] = self

    @classmethod
    def of(cls, kind: str) -> Registry[Any]:
        """The registry of that kind. Raises UserError, which lists the known kinds."""
        if kind not in cls._kinds:
            raise UserError(f"plugins: {unknown('kind of plug-in', kind, cls._kinds)}")
        return cls._kinds[kind]

    def register(self, name: str, thing: T | str) -> None:
        """Makes a thing known by name. Raises ValueError where the name is taken."""
        if name in self._things:
            raise ValueError(f"{self.kind} `{name}` is registered already")
        self._things[name] = thing

    def check(self, name: str) -> None:
        """Raises UserError, naming the field and the known names, for a name that nobody registered."""
        if name not in self._things:
            where = f"{self.field}: " if self.field else ""
            raise UserError(f"{where}{unknown(self.kind, name, self._things)}")

    def get(self, name: str) -> T:
        """The thing of that name. Raises UserError as `check` does."""
        self.check(name)
        thing = self._things[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = self._things[name] = getattr(importlib.import_module(module), attribute)
        return thing  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)
