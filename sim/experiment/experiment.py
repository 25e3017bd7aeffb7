"""Experiment: the frozen, validated description of a run, read from and written to TOML.

Its tables are in `sim.experiment.sections`. A mistake in an experiment ends in one readable message that names the
field, the value, the rule and the fix (exit code 2).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import tomlkit
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from untether.sim.core import strict_json
from untether.sim.core.durable import possible
from untether.sim.core.errors import UserError, unknown
from untether.sim.core.kinds import NAMED
from untether.sim.core.text import shown, valid
from untether.sim.experiment.arms import ARMS, CLOUD, FEDERATED, ORACLE, check_arms
from untether.sim.experiment.deployed import check_deployed, check_learners
from untether.sim.experiment.models.catalogue import EMBEDDED, training_of
from untether.sim.experiment.plugins import load_plugins, located, resolved
from untether.sim.experiment.privacy import Privacy
from untether.sim.experiment.section import Section
from untether.sim.experiment.sections import (
    ArmSettings,
    CloudSection,
    Engine,
    Evaluation,
    Filters,
    Generation,
    Lora,
    Model,
    PopulationSection,
    TaskSection,
    Training,
)
from untether.sim.experiment.strategy_section import Strategy, check_sharing
from untether.sim.experiment.virtual_sections import Drift, Hardware, Network


class Experiment(Section):
    """The whole run. Read with `Experiment.read`, written with `to_toml`."""

    name: str = Field("main", pattern=r"^\w[\w .+-]{0,99}$", description="a name for reports and run directories")
    plugins: tuple[str, ...] = Field(
        (), description="what brings filters, policies, tasks, ... of your own: .py files, seen from this one, and "
        "modules; see docs/extending.md"
    )
    seeds: tuple[int, ...] = Field((1,), min_length=1, description="each seed draws its own, disjoint users")
    rounds: int = Field(1, ge=1, le=100_000, description="rounds of virtual time; each asks the cloud and trains again")
    arms: tuple[str, ...] = Field(
        tuple(name for name, arm in ARMS.items() if arm.usual), min_length=1,
        description="treatments compared on the same devices: " + ", ".join(ARMS),
    )
    population: PopulationSection = PopulationSection()
    task: TaskSection = TaskSection()
    model: Model = Model()
    lora: Lora = Lora()
    training: Training = Training()
    generation: Generation = Generation()
    cloud: CloudSection = CloudSection()
    privacy: Privacy = Privacy()
    filters: Filters = Filters()
    network: Network = Network()
    hardware: Hardware = Hardware()
    drift: Drift = Drift()
    strategy: Strategy = Strategy()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    by_arm: dict[str, ArmSettings] = Field({}, description="hyper-parameters by arm")
    settings: dict[str, dict[str, Any]] = Field({}, description="settings of what plug-ins brought, by its name")

    @field_validator("plugins")
    @classmethod
    def _plugins_loaded(cls, plugins: tuple[str, ...]) -> tuple[str, ...]:
        with _refusing():
            return load_plugins(plugins)

    @field_validator("arms")
    @classmethod
    def _arms_known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        check_arms(arms)
        return tuple(arm for arm in ARMS if arm in arms)

    @field_validator("by_arm")
    @classmethod
    def _by_arm_known(cls, by_arm: dict[str, ArmSettings]) -> dict[str, ArmSettings]:
        check_arms(by_arm)
        for arm, own in by_arm.items():
            for name in ("steps", "epochs"):
                if name in own.training and (like := ARMS[arm].steps_of):
                    raise ValueError(
                        f"{arm}.training.{name}: this arm takes as many steps as {like}. Set "
                        f"by_arm.{like}.training.{name}, or leave it out"
                    )
        return by_arm

    @field_validator("seeds")
    @classmethod
    def _seeds_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
            raise ValueError(f"seeds = {list(seeds)}: give distinct integers, none negative")
        return seeds

    @model_validator(mode="after")
    def _names_known(self) -> Experiment:
        named: list[str] = []
        with _refusing():
            for registry in NAMED:
                section, _, field = registry.field.partition(".")
                value = getattr(getattr(self, section), field)
                for name in (value,) if isinstance(value, str) else value:
                    if name not in registry.beside:
                        registry.check(name)
                    named.append(name)
            object.__setattr__(self, "settings", resolved(named, self.settings))  # frozen from here on
        return self

    @model_validator(mode="after")
    def _private(self) -> Experiment:
        if "input" in self.privacy.never and CLOUD in self.arms:
            raise ValueError(
                f'privacy.never has "input", and arms has {CLOUD}, which shows the cloud its questions. Leave one out'
            )
        return self

    @model_validator(mode="after")
    def _something_withheld(self) -> Experiment:
        if ORACLE in self.arms and not self.population.max_history:
            raise ValueError(
                f'arms has "{ORACLE}", which learns older items of the user that the device does not have, and '
                "population.max_history = 0 leaves a device all of them. Set it to how many a device has, such as 8"
            )
        return self

    @model_validator(mode="after")
    def _task_declared(self) -> Experiment:
        if self.task.name:
            with _refusing():  # the room of tasks stands above this one
                importlib.import_module("untether.sim.population.declared").declare(self.task)
        return self

    @model_validator(mode="after")
    def _users_can_change(self) -> Experiment:
        if self.drift.kind == "none":
            return self
        changes = f'drift.kind = "{self.drift.kind}"'
        if self.population.source != "world":
            source, whose = self.population.source, "real" if self.population.source in ("lamp", "jsonl") else "its"
            raise ValueError(
                f'{changes} with population.source = "{source}": {whose} users change by themselves. Leave it at "none"'
            )
        if not self.population.replay:
            raise ValueError(
                f"{changes} without population.replay: every round would have the same history and queries, so nobody "
                "would change. Set population.replay = true"
            )
        return self

    @model_validator(mode="after")
    def _sharing_holds(self) -> Experiment:
        starts = {arm: self.for_arm(arm)[1] for arm in self.arms if ARMS[arm].trains}
        begun = {arm: training.start for arm, training in starts.items() if training.needs_shared}
        check_sharing(self.strategy, self.arms, begun)
        return self

    @model_validator(mode="after")
    def _deployable(self) -> Experiment:
        check_deployed(self.seeds, self.arms, self.filters, self.network, self.hardware)
        check_learners(self.engine.learners, self.strategy.name, self.drift.policy, self.hardware.clock)
        return self

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the adapters that devices train together, the least first."""
        return tuple(sorted(set(self.strategy.ranks))) or (self.for_arm(FEDERATED)[0].rank,)

    @model_validator(mode="after")
    def _somebody_reviews(self) -> Experiment:
        human, source = self.filters.human, self.population.source
        reviewed = "human" in self.filters.order and human.enabled
        if reviewed and not human.decisions and source != "world":
            raise ValueError(
                f'filters.order names "human" with population.source = "{source}": only the world\'s users are '
                "simulated. Run once without it, decide with `untether review RUN`, and set filters.human.decisions to "
                "the file that it writes"
            )
        return self

    @classmethod
    def read(cls, path: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> Experiment:
        """Reads a TOML file and applies overrides.

        Args:
            path: The file; None: the default experiment.
            overrides: Dotted fields, such as `lora.rank=4`.

        Raises:
            UserError: The message names the file or override, the field, the value, the rule and the nearest known key.
        """
        where, data = "the default experiment", {}
        if path is not None:
            where = str(possible(path))
            try:
                data = located(strict_json.toml(Path(path).read_text(encoding="utf-8")), Path(path).parent)
            except FileNotFoundError:
                raise UserError(f"{path}: no such experiment file. `untether experiment show` prints one.") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
                raise UserError(f"{path}: not a TOML file: {error}") from None
        return cls.build(data, overrides, where)

    @classmethod
    def parse(cls, text: str) -> Experiment:
        """Returns the experiment from which `to_toml` made this text."""
        return cls.build(strict_json.toml(text), None, "the experiment")

    @classmethod
    def build(cls, data: dict[str, Any], overrides: Mapping[str, str] | None, where: str) -> Experiment:
        """Returns an experiment from TOML data and dotted overrides; `where` names the source in a UserError."""
        for key, text in (overrides or {}).items():
            if valid(f"{key}{text}") != f"{key}{text}":
                raise UserError(f"--set {shown(f'{key}={text}', 80)}: it has bytes that are no UTF-8. Write it anew")
            _assign(data, key, parse_value(cls, key, text))
        try:
            return cls.model_validate(_with_defaults_of_the_model(data))
        except ValidationError as error:
            raise UserError(_explain(error, where)) from None

    @property
    def by_likelihood(self) -> bool:
        """Whether a label is chosen by its likelihood, instead of what the model writes."""
        classify = self.generation.classify
        return classify == "likelihood" or (classify == "auto" and self.model.base != EMBEDDED)

    def for_arm(self, arm: str) -> tuple[Lora, Training]:
        """Returns the LoRA and training settings of one arm, with `by_arm` applied."""
        own = self.by_arm.get(arm, ArmSettings())
        return (
            Lora.model_validate({**self.lora.model_dump(), **own.lora}),
            Training.model_validate({**self.training.model_dump(), **own.training}),
        )

    def to_toml(self, comments: bool = False) -> str:
        """Returns the resolved experiment as TOML; with `comments`, each field is followed by its meaning."""
        document = tomlkit.document()
        _write(document, self, comments)
        return tomlkit.dumps(document)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """A UserError as what pydantic takes for a refusal."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


def _with_defaults_of_the_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data, with the settings of training that suit their base model where they say nothing."""
    model, training = data.get("model", {}), data.get("training", {})
    if not isinstance(model, dict) or not isinstance(training, dict) or not isinstance(model.get("base", ""), str):
        return dict(data)
    suited = training_of(model.get("base", EMBEDDED))
    return {**data, "training": {**suited, **training}} if suited else dict(data)


def fields(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields every field of the experiment as (dotted name, default, meaning), including those of sections."""
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.")
        else:
            default = info.get_default(call_default_factory=True)
            yield f"{prefix}{name}", list(default) if isinstance(default, tuple) else default, info.description or ""


def parse_value(model: type[BaseModel], key: str, text: Any) -> Any:
    """Parses the text of a `--set` or of a run config: as TOML where possible, else as plain text.

    Lists may be written as a,b,c, and tables as JSON.

    Args:
        model: The model that has the field.
        key: The dotted field.
        text: The text; anything else is returned as it is.
    """
    if not isinstance(text, str):
        return text
    annotation = _annotation_of(model, key)
    wants_list = get_origin(annotation) is tuple
    if annotation is str:
        stripped = text.strip()
        return stripped[1:-1] if len(stripped) > 1 and stripped[0] == stripped[-1] == '"' else text
    if get_origin(annotation) is dict:
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            return json.loads(text)
    try:
        value = strict_json.toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if wants_list and not isinstance(value, list):
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        value = [parse_plain(part) for part in parts]
    return value


def key_values(words: Iterable[str] | None, option: str) -> dict[str, str]:
    """Parses words such as `lora.rank=4` as overrides.

    Raises:
        UserError: A word has no `=`; the message names the option.
    """
    found = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{option} {word}: give KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def parse_plain(text: str) -> Any:
    """Parses one item of a comma-separated list: an integer or float where it is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _annotation_of(model: type[BaseModel], key: str) -> Any:
    annotation: Any = model
    for part in key.split("."):
        section = _section(annotation)
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
    return annotation


def _section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Annotated, Union):
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {key}: `{part}` is a value, not a section")
    data[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            lines.append(f"{path}: {unknown('key', str(item['loc'][-1]), known)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], (dict, BaseModel)) else f" (got {item['input']!r})"
            lines.append(f"{path}: {message}{value}" if path else message + value)
    return f"{where} is not a valid experiment:\n  " + "\n  ".join(lines)


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `place` may have."""
    if place[:1] == ("by_arm",):
        if len(place) == 2:
            return list(ArmSettings.model_fields)
        place = place[2:]  # an arm's own tables are those of the experiment
    section: type[BaseModel] = Experiment
    for part in place:
        section = _section(section.model_fields[str(part)].annotation) or section
    return list(section.model_fields)


def _inline(value: dict[str, Any]) -> Any:
    """A table on one line, tables inside it too: what follows it still belongs to its section."""
    table = tomlkit.inline_table()
    for name, inner in value.items():
        table.add(name, _inline(inner) if isinstance(inner, dict) else inner)
    return table


def _write(table: Any, model: BaseModel, comments: bool) -> None:
    sections = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel) or name in ("by_arm", "settings"):
            sections.append((name, value))
            continue
        value = list(value) if isinstance(value, tuple) else value
        item = _inline(value) if isinstance(value, dict) else tomlkit.item(value)
        if comments and info.description:
            item.comment(info.description)
        table.add(name, item)
    for name, value in sections:
        inner = tomlkit.table()
        if isinstance(value, BaseModel):
            if comments and (meaning := type(value).__doc__):
                inner.add(tomlkit.comment(" ".join(meaning.split())))
            _write(inner, value, comments)
        else:
            if not value:
                continue
            for key, given in value.items():
                given = {k: v for k, v in given.model_dump().items() if v} if isinstance(given, BaseModel) else given
                inner.add(key, given)
        table.add(name, inner)
