"""The filters by name: a factory makes one from the experiment's `filters` section."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from untether.clients.filters.case import Filter
from untether.clients.filters.diversity import Diversity
from untether.clients.filters.length import Length
from untether.clients.filters.semantic import Semantic
from untether.sim.core.errors import UserError

Factory = Callable[[Any], Filter]

RESERVED = ("leak",)  # a verdict of the evaluator, never a filter of a device
_FACTORIES: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Add a filter. `factory(filters)` gets the whole `filters` section. A name can be taken once: else ValueError."""
    if name in _FACTORIES or name in RESERVED:
        raise ValueError(f"a filter named {name!r} exists already")
    _FACTORIES[name] = factory


def known() -> tuple[str, ...]:
    """The names that `filters.order` may list."""
    return tuple(_FACTORIES)


def create(filters: Any) -> list[Filter]:
    """The enabled filters of a `filters` section, in its order. Raises UserError for an unknown or repeated name."""
    made = []
    for position, name in enumerate(filters.order):
        if name not in _FACTORIES:
            near = difflib.get_close_matches(name, _FACTORIES, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise UserError(f'filters.order: no filter is named "{name}".{hint} Known: {", ".join(_FACTORIES)}.')
        if name in filters.order[:position]:
            raise UserError(f'filters.order lists "{name}" twice. A filter is applied once: name each one time.')
        section = getattr(filters, name, None)
        if getattr(section, "enabled", True):
            made.append(_FACTORIES[name](filters))
    return made


register("semantic", lambda filters: Semantic(filters.semantic))
register("diversity", lambda filters: Diversity(filters.diversity))
register("length", lambda filters: Length(filters.length))
