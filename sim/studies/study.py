"""A study: a TOML file with a base experiment, the axes along which it varies, and its analysis."""

from __future__ import annotations

import copy
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from untether.sim.core import strict_json
from untether.sim.core.durable import possible
from untether.sim.core.errors import UserError, unknown
from untether.sim.core.kinds import ANALYSES
from untether.sim.experiment import Experiment, fields, parse_plain
from untether.sim.experiment.arms import PRIMARY, check_arms
from untether.sim.experiment.plugins import load_plugins, located
from untether.sim.experiment.section import Section

FOLDER = Path(__file__).parent

OPTIONAL = "optional"
"""A variant with `optional = true` runs only where `--grid` names it."""


class FigureSpec(Section):
    """What the analysis `gain` draws: a contrast's gain along one axis, a panel a task."""

    x: str = Field("", description="the axis that runs from left to right; empty: the first")
    label: str = Field("", description="what that axis is, with its unit")
    contrasts: tuple[tuple[str, str], ...] = Field(PRIMARY, description="pairs of arms")

    @field_validator("contrasts")
    @classmethod
    def _arms_known(cls, contrasts: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        check_arms(itertools.chain(*contrasts))
        return contrasts


class StudyFile(Section):
    """A study as its TOML file has it. Cells are all combinations of the points of all axes, grid and variants.

    Those of which `moot` says that they would only repeat another one are left out.
    """

    name: str = Field(pattern=r"^\w[\w .+-]{0,99}$", description="a name for folders and titles")
    question: str = Field(description="what the study answers")
    analysis: str = Field("gain", description="what makes table, figures and findings of the cells")
    base: dict[str, Any] = Field({}, description="the experiment that all cells share")
    grid: dict[str, tuple[Any, ...]] = Field({}, description="axes: a field and its values")
    variants: dict[str, dict[str, dict[str, Any]]] = Field({}, description="axes: a name, and by name sets of fields")
    moot: dict[str, dict[str, tuple[Any, ...]]] = Field(
        {}, description="axes that make no difference where another axis has one of these values: run there with their "
        "first point alone"
    )
    figure: FigureSpec = FigureSpec()

    @field_validator("grid", mode="before")
    @classmethod
    def _dotted(cls, grid: Any) -> Any:
        return dict(_flat(grid)) if isinstance(grid, dict) else grid


@dataclass(frozen=True, slots=True)
class Point:
    """A place on an axis: the value (a variant: its name), and the fields that are set there."""

    value: Any
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: by axis the value (a variant: its name), and the experiment that it makes."""

    name: str
    values: Mapping[str, Any]
    experiment: Experiment

    @property
    def words(self) -> dict[str, str]:
        """The values by axis as they stand in names and tables."""
        return {axis: word(value) for axis, value in self.values.items()}


@dataclass(frozen=True, slots=True)
class Study:
    """A validated study: its file, its axes, and its cells in the order of the axes (the last one moves first)."""

    spec: StudyFile
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]

    def places(self, cell: Cell) -> list[dict[str, Any]]:
        """Returns the places of a cell, as values by axis: its own, and all along the axes that are moot there."""
        free = [
            axis for axis, where in self.spec.moot.items()
            if any(cell.values[other] in values for other, values in where.items())
        ]  # fmt: skip
        combinations = itertools.product(*(self.values(axis) for axis in free))
        return [{**cell.values, **dict(zip(free, chosen, strict=True))} for chosen in combinations]

    def values(self, axis: str) -> list[Any]:
        """Returns the values along an axis, in its order."""
        found: list[Any] = []
        for cell in self.cells:
            if cell.values[axis] not in found:
                found.append(cell.values[axis])
        return found

    @classmethod
    def read(
        cls, name_or_path: str, overrides: Mapping[str, str] | None = None, grid: Mapping[str, str] | None = None
    ) -> Study:
        """Reads a study by name (those that come with the package) or from a TOML file.

        Args:
            name_or_path: The study.
            overrides: Changes to the base.
            grid: Changes to axes: `{"cloud.samples": "0,8"}` gives a field other values, and `{"policy":
                "weekly,never"}` picks variants.

        Raises:
            UserError: A name, key, field, axis or value is unknown.
        """
        path = possible(name_or_path if name_or_path.endswith(".toml") else FOLDER / f"{name_or_path}.toml")
        if not path.is_file():
            known = sorted(file.stem for file in FOLDER.glob("*.toml"))
            what = unknown("study", name_or_path, known) if path.parent == FOLDER else f"{path}: no such study file"
            raise UserError(f"{what}. Give a name or the path of a TOML file")
        try:
            spec = StudyFile.model_validate(strict_json.toml(path.read_text(encoding="utf-8")))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not a TOML file: {error}") from None
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise UserError(f"{path} is not a valid study:\n  " + "\n  ".join(lines)) from None
        try:
            spec = spec.model_copy(update={"base": located(spec.base, path.parent)})
            load_plugins(spec.base.get("plugins", ()))
            ANALYSES.check(spec.analysis)
            axes = _axes(spec, grid or {})
            if spec.figure.x and spec.figure.x not in axes:
                raise UserError(f"figure.x: {unknown('axis', spec.figure.x, axes)}")
            for key in overrides or {}:
                if key in axes or any(key in point.fields for points in axes.values() for point in points):
                    raise UserError(f"--set {key}: the study varies this field. Choose its values with --grid")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(spec, tuple(axes), tuple(_cells(spec, axes, overrides, str(path))))


def _axes(spec: StudyFile, chosen: Mapping[str, str]) -> dict[str, tuple[Point, ...]]:
    axes = {name: tuple(Point(value, {name: value}) for value in values) for name, values in spec.grid.items()}
    for name, variants in spec.variants.items():
        if name in axes:
            raise UserError(f"variants.{name}: the grid has an axis of this name")
        points = {
            variant: Point(variant, dict(_flat({key: value for key, value in given.items() if key != OPTIONAL})))
            for variant, given in variants.items()
        }
        wanted = _names(chosen[name]) if name in chosen else [v for v in points if not variants[v].get(OPTIONAL)]
        for variant in wanted:
            if variant not in points:
                raise UserError(f"--grid {name}: {unknown('variant', variant, points)}")
        axes[name] = tuple(points[variant] for variant in wanted)
    for name, text in chosen.items():
        if name not in axes:
            raise UserError(f"--grid: {unknown('axis', name, axes)}")
        if name in spec.grid:
            axes[name] = tuple(Point(value, {name: value}) for value in _values(text))
    for name in itertools.chain(spec.moot, *spec.moot.values()):
        if name not in axes:
            raise UserError(f"moot: {unknown('axis', name, axes)}")
    _check(axes)
    return axes


def _check(axes: Mapping[str, Sequence[Point]]) -> None:
    """Every axis has a point, and every field exists and belongs to one axis."""
    if not axes:
        raise UserError("a study needs an axis: a [grid] or [variants]")
    known, owner = [key for key, _, _ in fields()], {}
    for name, points in axes.items():
        if not points:
            raise UserError(f"{name}: the axis has no values; give some here or by --grid {name}=...")
        for key in itertools.chain(*(point.fields for point in points)):
            if key not in known and not key.startswith("settings."):
                raise UserError(f"{name}: {unknown('field', key, known)}")
            if owner.setdefault(key, name) != name:
                raise UserError(f"{key} is set by two axes, {owner[key]} and {name}; a field belongs to one")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted fields: `drift.policy = "every"` may stand with or without quotes around its key."""
    # Fields that are tables themselves; those of plug-ins are tables of fields.
    tables = {key for key, default, _ in fields() if isinstance(default, dict) and key != "settings"}
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in tables:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


MAX_CELLS = 2000
"""Each is a run; they are counted before the first is built."""


def _cells(
    spec: StudyFile, axes: Mapping[str, Sequence[Point]], overrides: Mapping[str, str] | None, where: str
) -> Iterator[Cell]:
    seen: set[str] = set()
    many = math.prod(map(len, axes.values()))
    if many > MAX_CELLS:
        raise UserError(
            f"{where}: its axes make {many} cells, and a study has at most {MAX_CELLS}. "
            "Give fewer values (--grid AXIS=V1,V2)"
        )
    for points in itertools.product(*axes.values()):
        if _repeats(spec, axes, dict(zip(axes, points, strict=True))):
            continue
        data: dict[str, Any] = {"name": spec.name, **copy.deepcopy(spec.base)}
        for key, value in itertools.chain(*(point.fields.items() for point in points)):
            *tables, last = key.split(".")
            table = data
            for name in tables:
                table = table.setdefault(name, {})
            table[last] = value
        values = {axis: point.value for axis, point in zip(axes, points, strict=True)}
        name = ",".join(f"{axis.split('.')[-1]}={word(value)}" for axis, value in values.items())
        name = re.sub(r"[^\w.,=+-]", "_", name)  # it is a folder
        if name in seen:
            raise UserError(f"{where}: two cells are {name}: an axis has the same value twice")
        seen.add(name)
        yield Cell(name, values, Experiment.build(data, overrides, f"{where}, cell {name},"))


def _repeats(spec: StudyFile, axes: Mapping[str, Sequence[Point]], here: Mapping[str, Point]) -> bool:
    """Whether a combination differs from one before it only along an axis that is moot there."""
    return any(
        here[name] is not axes[name][0] and any(here[other].value in values for other, values in where.items())
        for name, where in spec.moot.items()
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _values(text: str) -> list[Any]:
    """`0,8`, `[4,4],[8,8]`, `world,lamp`: TOML values, or words."""
    try:
        return strict_json.toml(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        return [parse_plain(name) for name in _names(text)]


def word(value: Any) -> str:
    """Returns a value as it is written in names and tables: [8, 8] is `8`, [4, 8] is `4-8`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [word(item) for item in value]
        return items[0] if len(set(items)) == 1 else "-".join(items)
    return f"{value:g}" if isinstance(value, float) else str(value)
