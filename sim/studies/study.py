"""What a study is: a TOML file with a base experiment, a grid of fields, and what to draw."""

from __future__ import annotations

import copy
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from sim.errors import UserError, unknown
from sim.experiment import Experiment, fields
from sim.sections import ARMS, Section

FOLDER = Path(__file__).parent


class FigureSpec(Section):
    """What the study draws: a contrast's gain against one field of the grid, a panel a task."""

    x: str = Field(description="the field of the grid on the horizontal axis")
    label: str = Field("", description="what that field is, with its unit")
    contrasts: tuple[tuple[str, str], ...] = Field(
        (("collaborative", "local_matched"), ("collaborative", "placebo")), description="pairs of arms"
    )

    @field_validator("contrasts")
    @classmethod
    def _arms_known(cls, contrasts: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        for arm in itertools.chain(*contrasts):
            if arm not in ARMS:
                raise ValueError(unknown("arm", arm, ARMS))
        return contrasts


class StudyFile(Section):
    """A study as its TOML file has it."""

    name: str = Field(description="a name for folders and titles")
    question: str = Field(description="what the study answers")
    base: dict[str, Any] = Field({}, description="the experiment that all cells share")
    grid: dict[str, tuple[Any, ...]] = Field(min_length=1, description="field -> values; cells are all combinations")
    figure: FigureSpec


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: the values of its fields and the experiment they make."""

    name: str
    values: Mapping[str, Any]
    experiment: Experiment


@dataclass(frozen=True, slots=True)
class Study:
    """A validated study: its file and its cells in the order of the grid."""

    spec: StudyFile
    cells: tuple[Cell, ...]

    @classmethod
    def read(cls, name_or_path: str, overrides: Mapping[str, str] | None = None) -> Study:
        """A study by name (those that come with the package) or from a TOML file; `overrides` change the base.

        Raises UserError for an unknown name, key, field of the grid or value.
        """
        path = Path(name_or_path) if name_or_path.endswith(".toml") else FOLDER / f"{name_or_path}.toml"
        if not path.is_file():
            known = sorted(file.stem for file in FOLDER.glob("*.toml"))
            what = unknown("study", name_or_path, known) if path.parent == FOLDER else f"{path}: no such study file"
            raise UserError(f"{what}. Give a name or the path of a TOML file")
        try:
            spec = StudyFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not a TOML file: {error}") from None
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            raise UserError(f"{path} is not a valid study:\n  " + "\n  ".join(lines)) from None
        known_fields = [key for key, _, _ in fields()]
        for key in spec.grid:
            if key not in known_fields:
                raise UserError(f"{path}: grid: {unknown('field', key, known_fields)}")
        if spec.figure.x not in spec.grid:
            raise UserError(f"{path}: figure.x = `{spec.figure.x}` is no field of the grid: {', '.join(spec.grid)}")
        cells = []
        for values in itertools.product(*spec.grid.values()):
            point = dict(zip(spec.grid, values, strict=True))
            name = ",".join(f"{key.split('.')[-1]}={word(value)}" for key, value in point.items())
            cells.append(Cell(name, point, _experiment(spec, point, overrides, path)))
        return cls(spec, tuple(cells))


def _experiment(
    spec: StudyFile, point: Mapping[str, Any], overrides: Mapping[str, str] | None, path: Path
) -> Experiment:
    data: dict[str, Any] = {"name": spec.name, **copy.deepcopy(spec.base)}
    for key, value in point.items():
        *tables, last = key.split(".")
        table = data
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    return Experiment.build(data, overrides, str(path))


def word(value: Any) -> str:
    """A grid value as it stands in names and tables: [8, 8] is `8`, [4, 8] is `4-8`."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [word(item) for item in value]
        return items[0] if len(set(items)) == 1 else "-".join(items)
    return f"{value:g}" if isinstance(value, float) else str(value)
