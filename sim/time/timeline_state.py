"""The types of the timeline: the work to do, its result, and the state that one round leaves to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from untether.sim.time.asking import Ask, Asked, Final, Size
from untether.sim.time.hardware import Profile
from untether.sim.time.readiness import Body

REAL, SAMPLES, STALE = "real", "samples", "stale_samples"
"""What a version of an adapter was trained on: the device's own data; with this round's samples; with older ones."""


@dataclass(slots=True)
class VirtualWork:
    """An adapter to train in a round.

    Args:
        needs: The requests whose samples it waits for; none: it waits for nothing.
        steps, tokens: With all data; tokens include prompts.
        fallback_steps, fallback_tokens: With what it has until samples come; 0: nothing to train on.
        row_tokens: The longest example.
        from_s: Not before this moment.
    """

    device: int
    arm: str
    steps: int
    tokens: int
    needs: tuple[str, ...] = ()
    fallback_steps: int = 0
    fallback_tokens: int = 0
    row_tokens: int = 128
    from_s: float = 0.0


@dataclass(slots=True)
class TrainedVersion:
    """A trained adapter. `live_s`: from when it answers.

    `outcome`: `ok`, `out_of_memory`, `never_ready` or `superseded` (given up when samples came); only `ok` ones go
    live.
    """

    device: int
    arm: str
    round: int
    on: str
    begun_s: float
    live_s: float
    outcome: str
    load_s: float
    energy_j: float

    @property
    def name(self) -> str:
        """Round and data, such as `r2-samples`."""
        return f"r{self.round}-{self.on}"


_LASTING = tuple(field.name for field in fields(TrainedVersion))[2:]
"""Of a version, all but whose it is."""


@dataclass
class State:
    """The state that one round leaves to the next. `had_samples`: the devices that ever got any."""

    clouds: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    had_samples: set[int] = field(default_factory=set)
    bodies: dict[tuple[int, str], Body] = field(default_factory=dict)
    live: dict[tuple[int, str], list[TrainedVersion]] = field(default_factory=lambda: defaultdict(list))
    this_machine: Profile | None = None

    def after(
        self, start_s: float, asks: Sequence[Ask], lanes: Mapping[str, Asked], sizes: Mapping[str, Size],
        finals: Mapping[str, Final],
    ) -> State:  # fmt: skip
        """Returns a copy that includes the round's requests and results, without what the next round cannot need."""
        new = State(
            {**self.clouds, **{lane: asked.cloud_state for lane, asked in lanes.items()}},
            {**self.spent, **{lane: asked.spent for lane, asked in lanes.items() if asked.spent}},
            {lane: list(values) for lane, values in self.sizes.items()}, set(self.had_samples), dict(self.bodies),
            defaultdict(list, {key: _since(versions, start_s) for key, versions in self.live.items()}),
            self.this_machine,
        )
        for ask in asks:
            if (size := sizes.get(ask.request_id)) is not None:
                new._learn_size(ask.lane, size)
            if finals[ask.request_id].outcome == "ok" and ask.lane == "augment":
                new.had_samples.add(ask.device)
        return new

    def copy(self) -> State:
        """Returns a copy whose bodies and live adapters may change."""
        live = defaultdict(list, {key: list(versions) for key, versions in self.live.items()})
        return replace(self, bodies=dict(self.bodies), live=live)

    def _learn_size(self, lane: str, size: Size) -> None:
        """A running mean: count, then bytes up and down, tokens in and out."""
        count, *means = self.sizes.get(lane, [0, 0, 0, 0, 0])
        values = (size.bytes_up, size.bytes_down, size.tokens_in, size.tokens_out)
        means = [mean + (value - mean) / (count + 1) for mean, value in zip(means, values, strict=True)]
        self.sizes[lane] = [count + 1, *means]

    def dump(self) -> dict[str, Any]:
        """Returns the state as JSON, by arm and device: short, since a large fleet writes it every round."""
        bodies, live = defaultdict[str, dict[int, Any]](dict), defaultdict[str, dict[int, Any]](dict)
        for (device, arm), body in self.bodies.items():
            bodies[arm][device] = (body.time_s, body.battery, body.warmth)
        for (device, arm), found in self.live.items():
            live[arm][device] = [[getattr(version, name) for name in _LASTING] for version in found]
        return {
            "clouds": self.clouds, "spent": self.spent, "sizes": self.sizes, "had_samples": sorted(self.had_samples),
            "bodies": bodies, "live": live,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> State:
        """Returns the state that `dump` wrote."""
        measured = data.get("this_machine")
        return cls(
            dict(data.get("clouds", {})),
            {lane: {int(k): v for k, v in spent.items()} for lane, spent in data.get("spent", {}).items()},
            {lane: list(values) for lane, values in data.get("sizes", {}).items()},
            set(data.get("had_samples", ())),
            {key: Body(*values) for key, values in _by_device(data.get("bodies", {}))},
            defaultdict(list, {
                key: [TrainedVersion(*key, *values) for values in found]
                for key, found in _by_device(data.get("live", {}))
            }),
            Profile(**measured) if measured else None,
        )


def _since(versions: Sequence[TrainedVersion], time_s: float) -> list[TrainedVersion]:
    """Those that answer at `time_s` or later."""
    past = [version for version in versions if version.live_s <= time_s]
    return past[-1:] + [version for version in versions if version.live_s > time_s]


def _by_device(data: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[tuple[int, str], Any]]:
    """What `State.dump` wrote by arm and device."""
    for arm, of_devices in data.items():
        for device, values in of_devices.items():
            yield (int(device), arm), values
