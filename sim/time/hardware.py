"""Device hardware: a catalogue of real devices with a source for each figure, users' own profiles, and their
assignment.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from untether.sim.core.errors import UserError, unknown
from untether.sim.core.kinds import PROFILES
from untether.sim.core.seeding import derive
from untether.sim.time.devices.backends import BACKENDS, backend
from untether.sim.time.devices.heat import Heat

THIS_MACHINE = "this-machine"
"""The profile that is measured instead of looked up."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of device; `sim/time/hardware.toml` says what each figure means. `sources` has one for each figure."""

    name: str
    title: str
    kind: str
    ram_gib: float
    usable_ram: float
    compute_gflops: float
    training_share: float
    memory_gb_per_s: float
    decoding_share: float
    hot_share: float
    heating_s: float
    load_w: float
    idle_w: float
    radio_w: float
    battery_wh: float
    charge_w: float
    storage_gb: float
    sources: Mapping[str, str] = field(default_factory=dict)
    backend: str = "cpu"
    matrix_gflops: float | None = None
    cpu_gflops: float | None = None
    prefill_share: float | None = None
    layer_us: float | None = None
    knee: float = 0.0
    cooling_s: float | None = None

    @property
    def work_w(self) -> float:
        """What training or decoding takes above an idle device, at full speed."""
        return self.load_w - self.idle_w

    @property
    def prefill_gflops(self) -> float:
        """10^9 operations a second that reading a prompt reaches while cool."""
        share = backend(self.backend).prefill_share if self.prefill_share is None else self.prefill_share
        return share * (self.compute_gflops if self.matrix_gflops is None else self.matrix_gflops)

    @property
    def layer_s(self) -> float:
        """Seconds a layer and token that no rate explains."""
        return 1e-6 * (backend(self.backend).layer_us if self.layer_us is None else self.layer_us)

    def heat(self, level: float = 0.0) -> Heat:
        """Returns how it heats up and cools, from this warmth on."""
        return Heat(self.hot_share, self.heating_s, level, self.knee, self.cooling_s or 0.0)

    def on(self, name: str) -> Profile:
        """Returns the same device with the model on another of its processors (see `sim.time.devices.backends`)."""
        if name == self.backend:
            return self
        peak = self.cpu_gflops if name == "cpu" and self.cpu_gflops is not None else self.compute_gflops
        return replace(
            self, backend=name, compute_gflops=peak, matrix_gflops=None, prefill_share=None, layer_us=None,
            decoding_share=backend(name).decoding_share,
        )  # fmt: skip

    @property
    def on_mains(self) -> bool:
        """Whether it has no battery to spare."""
        return self.battery_wh == 0


FIGURES = tuple(f.name for f in fields(Profile) if f.default is MISSING and f.default_factory is MISSING)[3:]
"""The figures a profile must have."""

MAY_HAVE = ("matrix_gflops", "cpu_gflops", "prefill_share", "layer_us", "knee", "cooling_s")
"""The figures that have a default."""

SHARES = frozenset({"usable_ram", "training_share", "decoding_share", "hot_share", "prefill_share", "knee"})
MAY_BE_ZERO = frozenset({"battery_wh", "charge_w", "radio_w", "idle_w", "layer_us", "knee"})


@cache
def built_in() -> dict[str, Profile]:
    """Returns the catalogue that comes with the project."""
    text = files(__package__).joinpath("hardware.toml").read_text(encoding="utf-8")
    return _parse(text, "sim/time/hardware.toml", True)


def profiles() -> dict[str, Any]:
    """Returns the profiles registered from the start; that of this machine is measured by another package."""
    return {**built_in(), THIS_MACHINE: "untether.sim.launch.this_machine:measure"}


def catalogue(path: str = "") -> dict[str, Profile]:
    """Returns the profiles that are built in or come from plug-ins, and those of a TOML file.

    Raises:
        UserError: The message names file, profile, figure and rule.
    """
    known = {name: _registered(name) for name in PROFILES if name != THIS_MACHINE}
    if not path:
        return known
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hardware.catalogue = `{path}`: cannot be read: {error}") from None
    own = _parse(text, path, False)
    for name in own:
        if name in PROFILES:
            raise UserError(f"{path}: profile `{name}` exists already in the built-in catalogue. Give it another name")
    return {**known, **own}


def _registered(name: str) -> Profile:
    thing = PROFILES.get(name)
    return thing if isinstance(thing, Profile) else _profile(f"plugins, profile `{name}`", name, thing, False)


class Fleet:
    """The profile of each device, drawn from (seed, device).

    Args:
        names: Names of profiles, each perhaps with a weight (`name:3`).
        path: A catalogue of one's own; empty: none.
        seed: The seed.
        this_machine: The measured profile of this machine.

    Raises:
        UserError: Neither catalogue has a name, or a weight is no positive number.
    """

    def __init__(self, names: Sequence[str], path: str, seed: int, this_machine: Profile | None = None):
        known = catalogue(path)
        self.seed = seed
        self.profiles: list[Profile] = []
        self.weights: list[float] = []
        for entry in names:
            name, _, weight = entry.partition(":")
            if name == THIS_MACHINE:
                known[name] = this_machine or _measure()
            if name not in known:
                raise UserError(f"hardware.profiles: {unknown('profile', name, [*known, THIS_MACHINE])}")
            try:
                self.weights.append(float(weight) if weight else 1.0)
            except ValueError:
                self.weights.append(0.0)
            if not 0 < self.weights[-1] < float("inf"):
                raise UserError(f"hardware.profiles: `{entry}`: a weight must be a number above 0, such as {name}:3")
            self.profiles.append(known[name])

    def of(self, device_id: str) -> Profile:
        """Returns the device's profile."""
        drawn = derive(self.seed, device_id, "profile") / 2**63 * sum(self.weights)
        for profile, weight in zip(self.profiles, self.weights, strict=True):
            drawn -= weight
            if drawn < 0:
                return profile
        return self.profiles[-1]


@cache
def _measure() -> Profile:
    return PROFILES.get(THIS_MACHINE)()


def _parse(text: str, where: str, must_source: bool) -> dict[str, Profile]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not a TOML file: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: `{name}` must be a table of figures, [{name}]")
    return {name: _profile(f"{where}, [{name}]", name, table, must_source) for name, table in tables.items()}


def _profile(where: str, name: str, table: Mapping[str, Any], must_source: bool) -> Profile:
    for key in table:
        if key not in (*FIGURES, *MAY_HAVE, "title", "kind", "backend"):
            raise UserError(f"{where}: {unknown('figure', key, (*FIGURES, *MAY_HAVE))}")
    given = [*FIGURES, *(key for key in MAY_HAVE if key in table)]
    figures = {key: _figure(where, key, table.get(key)) for key in given}
    sources = {key: source for key, (_, source) in figures.items()}
    if figures["load_w"][0] <= figures["idle_w"][0]:
        raise UserError(
            f"{where}: load_w = {figures['load_w'][0]:g} with idle_w = {figures['idle_w'][0]:g}: both are power of the "
            "whole device, so load_w must be above idle_w"
        )
    if figures.get("knee", (0.0, ""))[0] >= 1:
        raise UserError(f"{where}: knee = 1: it would never slow down. Give less than 1, or hot_share = 1")
    if table.get("backend", "cpu") not in BACKENDS:
        raise UserError(f"{where}: {unknown('backend', str(table['backend']), BACKENDS)}")
    if must_source and not all(sources.values()):
        raise UserError(f"{where}: every figure needs its source")
    return Profile(
        name=name, title=str(table.get("title", name)), kind=str(table.get("kind", "device")),
        backend=str(table.get("backend", "cpu")), sources=sources,
        **{key: value for key, (value, _) in figures.items()},
    )


def _figure(where: str, key: str, given: Any) -> tuple[float, str]:
    if given is None:
        raise UserError(f"{where}: `{key}` is missing. A profile has {', '.join(FIGURES)}")
    value, source = (given[0], str(given[1])) if isinstance(given, list) and len(given) == 2 else (given, "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f'{where}: {key} = {given!r}: give a number, or [number, "its source"]')
    least, most = 0.0, 1.0 if key in SHARES else float("inf")
    if not least <= value <= most or (value == 0 and key not in MAY_BE_ZERO):
        rule = "above 0 and at most 1" if key in SHARES else "0 or above" if key in MAY_BE_ZERO else "above 0"
        raise UserError(f"{where}: {key} = {value}: it must be {rule}")
    return float(value), source
