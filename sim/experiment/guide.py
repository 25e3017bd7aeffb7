"""What is said of a field beside its meaning: its type and bounds, the names it knows, what its section changes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from untether.sim.core.errors import UserError, unknown
from untether.sim.core.kinds import NAMED
from untether.sim.core.package_data import find
from untether.sim.core.registry import Registry
from untether.sim.experiment.experiment import Experiment, fields

CHANGES = {
    "": "the size of the run: its cost grows with seeds, rounds and trained arms",
    "population": "who is simulated: the number of users is what intervals and p-values rest on; histories are what "
    "every arm learns from",
    "task": "how one's own data are asked and scored",
    "model": "the model that learns and answers on devices, in every arm but `majority` and `cloud`",
    "lora": "the adapter's size (storage, memory, upload where it is shared) and what it can learn; not the samples",
    "training": "how far adapters are trained, and the time and energy of it; not the samples",
    "generation": "how devices answer; training is the same",
    "cloud": "what the cloud is asked, what it writes, what devices upload and pay",
    "cloud.capacity": "virtual time alone: when answers arrive, what is refused, what it costs",
    "privacy": "what of a user's history the cloud is shown",
    "filters": "which samples train the arms that filter; scores are kept whether a filter is applied or not",
    "network": "virtual time alone: who reaches the cloud when; what never arrives is not trained on",
    "hardware": "virtual time and energy alone: when devices train, and how long things take",
    "drift": "how users change, and in which rounds devices ask and train again",
    "strategy": "which part of the adapters is shared, and how it is aggregated",
    "engine": "the speed alone, never the numbers",
    "evaluation": "how arms are compared; nothing that is run",
    "by_arm": "hyper-parameters of single arms",
    "settings": "what plug-ins read",
}  # fmt: skip
"""By section: what its fields change."""

READ_WHOLE = {
    "lora": ("clients/engine/adapters.py", "sim/time/cost.py"),
    "training": ("clients/engine/jobs.py", "clients/engine/training.py", "clients/engine/kernels/optimizer.py"),
    "filters.semantic": ("clients/filters/semantic.py",), "filters.diversity": ("clients/filters/diversity.py",),
    "filters.length": ("clients/filters/length.py",), "cloud": ("clients/cloud/client.py", "server/generator/world.py"),
    "cloud.capacity": ("sim/time/cloud_capacity.py", "sim/time/service.py"), "network": ("sim/time/network/links.py",),
    "hardware": ("sim/time/readiness.py", "sim/time/hardware.py"), "drift": ("sim/population/world/drift.py",),
    "strategy": ("strategies/fleet.py",), "evaluation": ("sim/evaluation/statistics.py",),
    "population": ("sim/population/source.py",), "engine": ("sim/launch/runtime.py",),
    "task": ("sim/population/declared.py",), "model": ("clients/device/worker.py",),
    "generation": ("clients/device/answering.py",),
    "privacy": ("clients/cloud/privacy.py",), "filters": ("clients/filters/judging.py",),
    "filters.adversarial": ("clients/filters/adversarial.py",), "filters.human": ("clients/filters/beside.py",),
    "filters.self_consistency": ("clients/filters/self_consistency.py",),
    "": ("sim/rounds/loop.py",), "by_arm": ("sim/experiment/experiment.py",), "settings": ("sim/core/registry.py",),
}  # fmt: skip
"""By section: the modules that are handed it whole, where a field's own name is not to be found."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One field, for a person: dotted name, meaning, default as TOML, what it may be, what it changes, and the modules
    that read it.
    """

    name: str
    meaning: str
    default: str
    values: str
    changes: str
    used: tuple[str, ...]
    studied: tuple[str, ...]


def names() -> list[str]:
    """Returns every field's dotted name."""
    return [name for name, _, _ in fields()]


def sections() -> list[str]:
    """Returns every section's dotted name."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names() if "." in name))


def in_section(section: str) -> list[tuple[str, str, str]]:
    """Returns (name, default, meaning) of a section's fields and those of its own sections. Raises UserError for no
    section.
    """
    if section not in sections():
        raise UserError(f"experiment show: {unknown('section', section, sections())}")
    return [(name, shown(value), meaning) for name, value, meaning in fields() if name.startswith(f"{section}.")]


def explain(name: str, places: bool = True) -> Explained:
    """Returns what there is to say of a field; without `places`, not where it is used, which takes a look at the
    source. Raises UserError, with the nearest name, where there is no such field.
    """
    found = {field: (default, meaning) for field, default, meaning in fields()}
    if name not in found:
        near = difflib.get_close_matches(name, found, 1, 0.5)
        section = (near[0] if near else name).rpartition(".")[0]
        some = [field for field in found if field.rpartition(".")[0] == section] or sections()
        raise UserError(f"experiment explain: {unknown('field', name, some)}. All: untether experiment show")
    default, meaning = found[name]
    section = name.rpartition(".")[0]
    changes = CHANGES.get(name) or CHANGES.get(section) or CHANGES[section.partition(".")[0]]
    used = (tuple(_readers(name)) or READ_WHOLE.get(section, ())) if places else ()
    studied = tuple(_studies(name)) if places else ()
    return Explained(name, meaning, shown(default), _values(name), changes, used, studied)


def shown(value: Any) -> str:
    """Returns a value as TOML writes it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def known_names(field: str) -> list[str]:
    """Returns what a field that names things can name, plug-ins left out; empty for other fields."""
    for registry in NAMED:
        if registry.field == field:
            return [*registry.beside, *registry.built_in()]
    if field in ("population.tasks", "hardware.profiles", "hardware.nominal_model"):
        kind = {"population.tasks": "task", "hardware.profiles": "profile"}.get(field, "model")
        return Registry.of(kind).built_in()
    if field == "arms":
        from untether.sim.experiment.arms import ARMS

        return list(ARMS)
    info = _info(field)
    return [shown(option).strip('"') for option in _options(info.annotation)]


def _values(field: str) -> str:
    info = _info(field)
    kind = _kind(info.annotation)
    bounds = [text for rule in info.metadata if (text := _bound(rule))]
    known = known_names(field)
    text = kind if kind != "one of" else ""
    if known:
        text = f"{text}, each one of" if text.startswith("list") else "one of"
        text += " " + ", ".join(known)
    return ", ".join(filter(None, [text.strip(), " and ".join(bounds)]))


def _info(field: str) -> FieldInfo:
    model: Any = Experiment
    *path, last = field.split(".")
    for part in path:
        model = _model(model.model_fields[part].annotation)
    return model.model_fields[last]


def _model(annotation: Any) -> type[BaseModel]:
    if get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = get_args(annotation)[0]
    return annotation


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of"
    if origin is tuple:
        inner = get_args(annotation)
        several = inner[-1:] == (Ellipsis,)
        return f"list of {_kind(inner[0])}s" if several else f"list of {len(inner)} {_kind(inner[0])}s"
    if origin is dict:
        return "table"
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "nothing"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _options(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _bound(rule: Any) -> str:
    words = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"), ("min_length", "at least"))
    for name, text in words:
        if (value := getattr(rule, name, None)) is not None:
            return f"{text} {value:g}" + (" of them" if name == "min_length" else "")
    return ""


def _readers(field: str) -> Iterator[str]:
    """Modules of the project that read the field by its name behind its section's."""
    section, _, last = field.rpartition(".")
    owner = section.rpartition(".")[2] or "experiment"
    wanted = re.compile(rf"\b{re.escape(owner)}\.{re.escape(last)}\b(?!\()")
    for root in _roots():
        for path in sorted(root.rglob("*.py")):
            module = path.relative_to(root.parent)
            if module.parts[:2] in _ABOUT:
                continue
            code = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text(encoding="utf-8"))
            if wanted.search(code):
                yield module.as_posix()


_ABOUT = {("sim", room) for room in ("experiment", "studies", "terminal", "report")}
"""Rooms that speak of fields instead of following them."""


def _studies(field: str) -> Iterator[str]:
    """The built-in studies that vary it or set it."""
    for path in sorted((find("sim/studies/scale.toml").parent).glob("*.toml")):
        if re.search(rf"{re.escape(field)}\b", path.read_text(encoding="utf-8")):
            yield path.stem


def _roots() -> Iterator[Path]:
    sim = Path(__file__).resolve().parents[1]
    yield from (sim.parent / name for name in ("sim", "clients", "server", "strategies"))
