"""The types of the timeline: the work to do, its result, and the state that one round leaves to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from untether.sim.time.asking import Ask, Asked, Final, Size
from untether.sim.time.hardware import Profile
from untether.sim.time.readiness import Body

REAL, SAMPLES, STALE = "real", "samples", "stale_samples"
"""What a version of an adapter was trained on: the device's own data; with this round's samples; with older ones."""


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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


@dataclass
class State:
    """The state that one round leaves to the next."""

    clouds: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent: dict[str, dict[int, float]] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    had_samples: dict[int, int] = field(default_factory=dict)
    bodies: dict[tuple[int, str], Body] = field(default_factory=dict)
    live: dict[tuple[int, str], list[TrainedVersion]] = field(default_factory=lambda: defaultdict(list))
    this_machine: Profile | None = None

    def after(
        self, round: int, start_s: float, asks: Sequence[Ask], lanes: Mapping[str, Asked], sizes: Mapping[str, Size],
        finals: Mapping[str, Final],
    ) -> State:  # fmt: skip
        """Returns a copy that includes the round's requests and results, without what the next round cannot need."""
        new = State(
            {**self.clouds, **{lane: asked.cloud_state for lane, asked in lanes.items()}},
            {**self.spent, **{lane: asked.spent for lane, asked in lanes.items() if asked.spent}},
            {lane: list(values) for lane, values in self.sizes.items()}, dict(self.had_samples), dict(self.bodies),
            defaultdict(list, {key: _since(versions, start_s) for key, versions in self.live.items()}),
            self.this_machine,
        )
        for ask in asks:
            if (size := sizes.get(ask.request_id)) is not None:
                new._learn_size(ask.lane, size)
            if finals[ask.request_id].outcome == "ok" and ask.lane == "augment":
                new.had_samples[ask.device] = round
        return new

    def copy(self) -> State:
        """Returns a copy whose bodies and live adapters may change."""
        live = defaultdict(list, {key: list(versions) for key, versions in self.live.items()})
        return replace(self, bodies=dict(self.bodies), live=live)

    def forget(self, device: int, arm: str) -> None:
        """Drops what is known of a device under one arm."""
        self.bodies.pop((device, arm), None)
        self.live.pop((device, arm), None)

    def _learn_size(self, lane: str, size: Size) -> None:
        """A running mean: count, then bytes up and down, tokens in and out."""
        count, *means = self.sizes.get(lane, [0, 0, 0, 0, 0])
        values = (size.bytes_up, size.bytes_down, size.tokens_in, size.tokens_out)
        means = [mean + (value - mean) / (count + 1) for mean, value in zip(means, values, strict=True)]
        self.sizes[lane] = [count + 1, *means]

    def dump(self) -> dict[str, Any]:
        """Returns the state as JSON."""
        return {
            "clouds": self.clouds, "sizes": self.sizes,
            "spent": {lane: {str(k): v for k, v in spent.items()} for lane, spent in self.spent.items()},
            "had_samples": {str(device): round for device, round in self.had_samples.items()},
            "bodies": {_key(*key): [body.time_s, body.battery, body.warmth] for key, body in self.bodies.items()},
            "live": {_key(*key): [_dumped(version) for version in found] for key, found in self.live.items()},
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> State:
        """Returns the state that `dump` wrote."""
        measured = data.get("this_machine")
        return cls(
            dict(data.get("clouds", {})),
            {lane: {int(k): v for k, v in spent.items()} for lane, spent in data.get("spent", {}).items()},
            {lane: list(values) for lane, values in data.get("sizes", {}).items()},
            {int(device): round for device, round in data.get("had_samples", {}).items()},
            {_unkey(key): Body(*values) for key, values in data.get("bodies", {}).items()},
            defaultdict(list, {
                _unkey(key): [TrainedVersion(**values) for values in found]
                for key, found in data.get("live", {}).items()
            }),
            Profile(**measured) if measured else None,
        )


def _since(versions: Sequence[TrainedVersion], time_s: float) -> list[TrainedVersion]:
    """Those that answer at `time_s` or later."""
    past = [version for version in versions if version.live_s <= time_s]
    return past[-1:] + [version for version in versions if version.live_s > time_s]


def _dumped(version: TrainedVersion) -> dict[str, Any]:
    """Its fields by name; `asdict` copies each value deeply, a great many times a round."""
    return {name: getattr(version, name) for name in TrainedVersion.__slots__}


def _key(device: int, arm: str) -> str:
    return f"{device}/{arm}"


def _unkey(key: str) -> tuple[int, str]:
    device, _, arm = key.partition("/")
    return int(device), arm
