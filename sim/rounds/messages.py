"""What travels between the round loop and the hosts of devices: typed orders, typed replies.

An order carries all that it is about: small values, rows that each name the device they are for, and arrays. A reply
carries counts by device, events, and arrays that may be shared. No text of a user is in either, and no path: what is
private stays in the devices' store, where *parts*, named rows of a table, can be told apart by round and name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from untether.sim.core.errors import Failure
from untether.sim.core.records import Part
from untether.sim.population.source import device_id
from untether.sim.rounds.material import Material

_COUNTS = [field.name for field in fields(Material)]
_NOT_COUNTED = ("device", "outcome", "errors")


SUM, STACK = "sum/", "stack/"
"""In the names of a reply's arrays, behind the group: partial results of several devices. Those of one name add up, or
are put one behind the other.
"""

FIRST = ".first"
"""Behind the arm's name: how the first of two adapters of one round is kept."""


class RequestOf(NamedTuple):
    """A request at the cloud, of a device."""

    device: int
    request: str


class Version(NamedTuple):
    """An adapter that may answer in a round. `round`: in which it is or was trained, `on` real data or samples too;
    `live_s`: from when it answers; `kept`: under which name its device's store has it.
    """

    device: int
    arm: str
    round: int
    on: str
    live_s: float
    kept: str


class Samples(NamedTuple):
    """The rounds, `first` to `last`, whose samples a device trains `on`."""

    device: int
    first: int
    last: int
    on: str


class TrainedIn(NamedTuple):
    """The round in which a device last took part in training what is shared."""

    device: int
    round: int


class Upload(NamedTuple):
    """What an attempt at the cloud sent off a device, in copies of its request's message."""

    device: int
    request: str
    attempt: int
    time_s: float
    copies: float


def _rows(kind: type) -> Any:
    return field(default=(), metadata={"rows": kind})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What hosts are told to do in a round, for which devices. Rows are for the device that they name, nobody else."""

    work: ClassVar[str]

    seed: int
    round: int
    devices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Unique among the orders of a pass, however they are split: the name of what is kept of it."""
        whose = f"{device_id(self.devices[0])}-{device_id(self.devices[-1])}-" if self.devices else ""
        return f"{self.work}-{whose}{len(self.devices)}"

    def cut(self, devices: Collection[int]) -> Self:
        """Returns the order for some of its devices: with their rows alone, and everything else as it is."""
        mine = set(devices)
        rows = {
            each.name: tuple(row for row in getattr(self, each.name) if row.device in mine)
            for each in fields(self) if each.metadata.get("rows") not in (None, Part)
        }  # fmt: skip
        return replace(self, devices=tuple(devices), **rows)

    def split(self, hosts: int) -> dict[int, Self]:
        """Returns the order by host: device i lives on host i mod `hosts`. No order for a host without devices."""
        found = {host: [device for device in self.devices if device % hosts == host] for host in range(hosts)}
        return {host: self.cut(own) for host, own in found.items() if own}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Order):
    """Ask the cloud, and filter what it writes. `due`: who asks for samples; `held`: requests that are not made."""

    work: ClassVar[str] = "fetch"

    due: tuple[int, ...] = ()
    held: tuple[RequestOf, ...] = _rows(RequestOf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refilter(Order):
    """Filter again, without the `lost` answers. `samples`: what the fetch pass left, of all hosts."""

    work: ClassVar[str] = "filter"

    lost: tuple[RequestOf, ...] = _rows(RequestOf)
    samples: tuple[Part, ...] = _rows(Part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share(Order):
    """Train the adapters that belong to no device: of every `parts` of them the one numbered `part`."""

    work: ClassVar[str] = "share"

    part: int = 0
    parts: int = 1

    def split(self, hosts: int) -> dict[int, Self]:
        """Returns a part a host."""
        return {host: replace(self, part=host, parts=hosts) for host in range(hosts)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin(Order):
    """Say what the strategy shares before the first round. `groups`: of devices that share with each other."""

    work: ClassVar[str] = "begin"

    groups: tuple[str, ...] = ()

    def split(self, hosts: int) -> dict[int, Self]:
        """Returns one host knows."""
        return {0: self}


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(Order):
    """Train what the strategy has devices train together. `arrays`: what is shared, `GROUP/...`; `trained`: the round
    in which each device did so last.
    """

    work: ClassVar[str] = "update"

    trained: tuple[TrainedIn, ...] = _rows(TrainedIn)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learn(Order):
    """Train, answer, score.

    `due`: who asked in this round; `versions`: every adapter that may answer, those to be trained now (of this round)
    among them; `trains`: whose samples are trained on; `lost`: answers to the cloud arm's questions that never came;
    `uploads`: what devices sent; `settled`: every adapter up to that round is live; `measured`: for the worker's own
    timeline (JSON); `samples`, `answers`: what earlier passes left, of all hosts; `arrays`: the shared adapters.
    """

    work: ClassVar[str] = "learn"

    due: tuple[int, ...] = ()
    settled: int = -1
    measured: str = "{}"
    versions: tuple[Version, ...] = _rows(Version)
    trains: tuple[Samples, ...] = _rows(Samples)
    lost: tuple[RequestOf, ...] = _rows(RequestOf)
    uploads: tuple[Upload, ...] = _rows(Upload)
    samples: tuple[Part, ...] = _rows(Part)
    answers: tuple[Part, ...] = _rows(Part)
    trained: tuple[TrainedIn, ...] = _rows(TrainedIn)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


ORDERS: dict[str, type[Order]] = {kind.work: kind for kind in (Fetch, Refilter, Share, Begin, Update, Learn)}


@dataclass(frozen=True, slots=True)
class Reply:
    """What one host says of an order.

    `columns`: a value a device, `device` (its number) and `outcome` among them. `lost`: what became of the devices that
    are in no column, by number: they are not paired with what others counted. `events`: rows of the table of that
    name. `parts`: the names of what it left in the devices' store, by table. `models`: what it used, by name, with the
    fingerprint. `failures`: the workers that died under it. `facts`: counts and texts of models, by name. `arrays`:
    what it shares: of `Update`, `GROUP/sum/...` and `GROUP/stack/...`. `tables`: rows by table, without any text of a
    user, of a node whose store is not the run directory.
    """

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    failures: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def counts(self) -> dict[str, float]:
        """Returns the sum of every counted column, and the number of devices by outcome."""
        found = {name: sum(values) for name, values in self.columns.items() if not name.startswith(_NOT_COUNTED)}
        outcomes = [*self.columns.get("outcome", ()), *self.lost.values()]
        return found | {f"outcome.{name}": outcomes.count(name) for name in sorted(set(outcomes))}


def joined(replies: Iterable[Reply]) -> Reply:
    """Returns the replies to one order as one. Numbers of a fact add up; of a text, the last one counts."""
    columns: dict[str, list[Any]] = {}
    parts: dict[str, list[str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    events, models, failures = [], {}, []
    arrays: dict[str, np.ndarray] = {}
    lost: dict[int, str] = {}
    for reply in replies:
        for mine, theirs in ((columns, reply.columns), (parts, reply.parts)):
            for name, values in theirs.items():
                mine.setdefault(name, []).extend(values)
        for fact, said in reply.facts.items():
            known = facts.setdefault(fact, {})
            for name, value in said.items():
                known[name] = known.get(name, 0) + value if isinstance(value, int) else value
        events += reply.events
        models |= reply.models
        failures += reply.failures
        lost |= reply.lost
        for name, array in reply.arrays.items():
            kind = name.partition("/")[2]
            if name in arrays and kind.startswith(SUM):
                array = np.asarray(arrays[name] + array)  # a sum of two 0-d arrays is none
            elif name in arrays and kind.startswith(STACK):
                array = np.concatenate([arrays[name], array])
            arrays[name] = array
    return Reply(columns, events, parts, models, failures, facts, arrays, lost)


def complete(devices: Iterable[int], reply: Reply) -> None:
    """Raises Failure if a device of the plan is not in the reply: a round is committed whole."""
    wanted = set(devices)
    if missing := wanted.difference(reply.columns.get("device", ()), reply.lost):
        raise Failure(f"{len(missing)} of {len(wanted)} devices are in no host's reply, such as {min(missing)}")


def outcomes(reply: Reply) -> dict[int, str]:
    """Returns what became of each device."""
    return dict(_by_device(reply, "outcome")) | dict(reply.lost)


def materials(reply: Reply) -> dict[int, Material]:
    """Returns what each device could train on; a device that was lost in the pass has none."""
    return {device: Material(*counts) for device, *counts in _by_device(reply, *_COUNTS)}


def errors(reply: Reply) -> dict[str, dict[int, list[float]]]:
    """Returns how wrong each device's answers were, where the policy wants to know: by what the watched arm learns
    from.
    """
    names = sorted(name for name in reply.columns if name.startswith("errors."))
    return {
        name.removeprefix("errors."): {device: json.loads(found) for device, found in _by_device(reply, name)}
        for name in names
    }


def _by_device(reply: Reply, *names: str) -> Iterator[tuple[Any, ...]]:
    yield from zip(*(reply.columns.get(name, ()) for name in ("device", *names)), strict=False)
