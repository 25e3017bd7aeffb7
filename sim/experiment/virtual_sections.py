"""The tables of an experiment that define its virtual time: links, hardware, the cloud's capacity, how users change."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from untether.sim.core.clock import Span
from untether.sim.experiment.section import Section


def _spans(texts: tuple[str, ...], groups: bool) -> tuple[str, ...]:
    for text in texts:
        if not Span.parse(text).everybody and not groups:
            raise ValueError(f"`{text}`: the cloud's outages meet every device. For a group: network.outages")
    return texts


def _day_hours(hours: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= hour <= 24 for hour in hours) or hours[0] % 24 == hours[1] % 24:
        raise ValueError(f"{list(hours)}: give [from, to], two different hours of the day between 0 and 24")
    return hours


class CloudCapacity(Section):
    """How much the cloud can serve in virtual time, and how a device tries again. The default cloud has no limits."""

    concurrency: int = Field(0, ge=0, description="requests served at once; 0: any number")
    queue: int = Field(-1, ge=-1, description="requests that may wait; -1: any number; beyond: `server_error`")
    prompt_tokens_per_s: float = Field(0.0, ge=0, description="prompt tokens a request reads a second; 0: no time")
    output_tokens_per_s: float = Field(0.0, ge=0, description="tokens a request writes a second; 0: no time")
    requests_per_minute: float = Field(0.0, ge=0, description="accepted for all devices together; 0: any number")
    tokens_per_minute: float = Field(0.0, ge=0, description="prompt and output together, of all devices; 0: any number")
    price_in: float = Field(0.0, ge=0, description="of a million prompt tokens")
    price_out: float = Field(0.0, ge=0, description="of a million output tokens")
    budget: float = Field(0.0, ge=0, description="what a device may spend in the whole run; 0: no limit")
    outages: tuple[str, ...] = Field(
        (), description="when the cloud is down, such as `36h+6h`: from hour 36 of the run, for 6 hours (s, m, h, d)"
    )
    retries: int = Field(8, ge=0, description="attempts after the first, a request")
    backoff_s: float = Field(2.0, gt=0, description="the first wait; it doubles, with jitter; Retry-After is honoured")
    max_backoff_s: float = Field(1800.0, gt=0, description="the longest wait between attempts")

    @field_validator("outages")
    @classmethod
    def _outages(cls, outages: tuple[str, ...]) -> tuple[str, ...]:
        return _spans(outages, groups=False)


class Network(Section):
    """The devices' links to the cloud, in virtual time. The default link is always up."""

    kind: str = Field(
        "always", description="when a link is up: `always`; `onoff`, generated spells; `trace`, what `traces` say"
    )
    availability: float = Field(
        1.0, ge=0, le=1, description="share of whole days a link is up, whatever the rhythm, in one knob: below 1 it "
        "adds on/off spells to any kind, with gaps of mean_down_s and mean_up_s made to fit (at 1, `onoff` has its own "
        "mean_up_s). wifi_only, outages and state traces take their time on top"
    )
    mean_up_s: float = Field(1200.0, gt=0, description="onoff: mean length of a spell with a link")
    mean_down_s: float = Field(1200.0, gt=0, description="mean length of a gap, before rhythm joins any")
    distribution: Literal["exponential", "constant", "lognormal"] = Field(
        "exponential", description="of the spells' lengths (lognormal: sigma 1)"
    )
    rhythm: float = Field(
        0.0, ge=0, le=1, description="on/off spells: share of them that is lost at the quietest hour (fewer where "
        "availability leaves no room for so many)"
    )
    quiet_hour: float = Field(3.0, ge=0, lt=24, description="the quietest hour of the day")
    wifi_only: bool = Field(False, description="only on Wi-Fi: within wifi_hours, or where state traces say so")
    wifi_hours: tuple[float, float] = Field((19.0, 7.0), description="from and to, hours of the day, about an hour off")
    traces: str = Field("", description="a log or a folder of logs: sabre JSON, Pensieve, mahimahi, FLASH states, CSV")
    columns: dict[str, str] = Field(
        {}, description='of CSV logs, which column is what, the unit behind a colon: {time = "Timestamp", down = '
        '"DL_bitrate:kbps"}, and `latency`; units: s, ms; mbps (unless said), kbps, bps'
    )
    scale: float = Field(1.0, gt=0, description="factor on every bandwidth")
    downlink_mbps: float = Field(28.8, gt=0, description="Mbit/s; bandwidth logs take its place")
    uplink_mbps: float = Field(10.0, gt=0, description="Mbit/s; beside a log: in its ratio to downlink_mbps")
    rtt_s: float = Field(0.05, ge=0, description="round-trip time; logs with a latency take its place")
    outages: tuple[str, ...] = Field(
        (), description="`36h+6h`: no link from hour 36 for 6 hours; `36h+6h:25%` for a random quarter of the devices, "
        "`36h+6h:0-99` for those numbers"
    )
    ask_within_h: float = Field(1.0, ge=0, le=24, description="devices ask at a random moment of a round's first hours")
    fallback: Literal["real_data", "wait", "stale_samples"] = Field(
        "real_data", description="when asking fails, until samples come: train on real data, wait, or train on the "
        "last samples that came"
    )

    @field_validator("outages")
    @classmethod
    def _outages(cls, outages: tuple[str, ...]) -> tuple[str, ...]:
        return _spans(outages, groups=True)

    @field_validator("wifi_hours")
    @classmethod
    def _hours(cls, hours: tuple[float, float]) -> tuple[float, float]:
        return _day_hours(hours)

    @model_validator(mode="after")
    def _traces(self) -> Network:
        if self.kind == "trace" and not self.traces:
            raise ValueError('kind = "trace" needs network.traces, a log or a folder of logs')
        if self.kind == "always" and self.traces:
            raise ValueError(
                f'traces = "{self.traces}" is not read with kind = "always". Set network.kind to "trace", or to '
                '"onoff" for bandwidth logs beside generated spells'
            )
        return self


class Hardware(Section):
    """The machines, in virtual time; costs are those of `nominal_model`, not of the model that learns here."""

    clock: Literal["virtual", "wall"] = Field(
        "virtual", description="`wall`: the devices are real (a deployment), so nothing of them is simulated"
    )
    profiles: tuple[str, ...] = Field(
        ("pixel-8",), min_length=1,
        description="names of the catalogue, one drawn for each device; `name:3` is three times as likely"
    )
    catalogue: str = Field("", description="TOML file with profiles of your own, beside the built-in ones")
    nominal_model: str = Field("Qwen2.5-0.5B", description="the model that a real device would run")
    weight_bits: Literal[4, 8, 16, 32] = Field(16, description="of the frozen base's weights on the device")
    gradient_checkpointing: bool = Field(
        False, description="training keeps less and computes it again: memory of one layer, 1.23 times the time"
    )
    train_when: Literal["always", "idle", "charging", "battery", "schedule", "trace"] = Field(
        "always", description="idle: unused, with battery; charging: unused and plugged in; battery: above "
        "battery_threshold or plugged in; schedule: within train_hours; trace: as network.traces' states say"
    )
    train_hours: tuple[float, float] = Field((22.0, 6.0), description="schedule: from and to, hours of the day")
    battery_threshold: float = Field(0.5, ge=0, lt=1, description="no training on battery below this level")
    queries: Literal["round_end", "day"] = Field(
        "round_end", description="when users ask: after the round's work, or through the day, answered by whatever "
        "adapter is live"
    )

    @field_validator("train_hours")
    @classmethod
    def _hours(cls, hours: tuple[float, float]) -> tuple[float, float]:
        return _day_hours(hours)


class Drift(Section):
    """How users change (world), and when a device asks the cloud and trains again."""

    kind: Literal["none", "gradual", "abrupt", "recurring"] = Field(
        "none", description="world: how users change from one persona to another"
    )
    day: float = Field(10.0, ge=0, description="world: day of the run on which the change begins")
    rate: float = Field(0.05, gt=0, description="gradual: share of the way a day")
    period: float = Field(14.0, gt=0, description="recurring: days of one turn, half of them in each persona")
    size: float = Field(1.0, ge=0, le=1, description="how far the way goes; 1: into another persona altogether")
    share: float = Field(1.0, ge=0, le=1, description="share of the users that change at all")
    jitter_days: float = Field(7.0, ge=0, description="a user's change begins up to so many days later")
    policy: str = Field(
        "every", description="when a device asks and trains again: `every` so many rounds; `never` after its first "
        "time; `on_drift`, when its detector finds its answers worse; `when_online`, as every, but only in rounds with "
        "a link; `budget`, as every, while drift.tokens last"
    )
    every: int = Field(1, ge=1, description="every, budget: rounds from one time to the next")
    stagger: int = Field(
        1, ge=1, description="device i asks for the first time in round i mod stagger, so that an adapter's age is not "
        "the calendar"
    )
    tokens: int = Field(0, ge=0, description="budget: cloud tokens, read and written, that a device may spend")
    detector: str = Field(
        "page_hinkley", description="on_drift: `adwin` or `page_hinkley`, watches how wrong the device's answers were, "
        "as its user corrected them"
    )
    false_alarms: float = Field(
        0.2, gt=0, lt=1, description="on_drift: share of devices whose user did not change that may raise an alarm"
    )
    samples: Literal["refresh", "keep", "age"] = Field(
        "refresh", description="synthetic samples of earlier rounds: dropped, kept, or used for max_age rounds in all"
    )
    max_age: int = Field(
        7, ge=1, description="age: rounds that a synthetic sample is used, that in which it came among them; 1 is as "
        "refresh"
    )
