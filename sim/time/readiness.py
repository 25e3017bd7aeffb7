"""When a device may train, and how long that takes: permission, battery and heat, all in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

from untether.sim.core.clock import HOUR_S
from untether.sim.core.errors import UserError
from untether.sim.experiment.virtual_sections import Hardware
from untether.sim.time.devices.heat import cooled, heated
from untether.sim.time.hardware import Profile
from untether.sim.time.network.spells import (
    ALWAYS,
    Daily,
    OnOff,
    Remembered,
    Spells,
    Windows,
    all_of,
    next_up,
    up_until,
)
from untether.sim.time.network.traces import StateTrace

CHARGE_HOURS, CHARGE_JITTER_S = (22.5, 6.5), 1.5 * HOUR_S
"""Phones charge over night (an assumption: traces say it better)."""

SLEEP_HOURS, SLEEP_JITTER_S = (23.0, 7.0), HOUR_S
IDLE_S, USE_S = 25 * 60.0, 5 * 60.0
"""By day a phone lies idle for 25 minutes and is used for 5, on average (an assumption)."""

DAY_USE = 0.6 / 16
"""Share of its battery that a phone spends an hour off the charger, idle time and all: 60% in 16 hours (an
assumption). Work drains it by what it takes above an idle device."""

FOREVER_S = 400 * 86_400.0
"""Work that finds no chance for so long is never done."""


class Either:
    """Up when either of two is."""

    def __init__(self, one: Spells, other: Spells):
        self.one, self.other = one, other

    def at(self, time_s: float) -> tuple[bool, float]:
        up, until = self.one.at(time_s)
        if up:  # until then, whatever the other does
            return True, until
        other_up, other_until = self.other.at(time_s)
        return (True, other_until) if other_up else (False, min(until, other_until))


@dataclass(frozen=True, slots=True)
class Readiness:
    """When a device is allowed to train (`allowed`) and charges, and whether a battery level binds it."""

    allowed: Spells
    charging: Spells
    threshold: float | None = None
    drawn: OnOff | None = None

    def forget(self, before_s: float) -> None:
        """Drops the drawn habits of earlier days."""
        if self.drawn is not None:
            self.drawn.forget(before_s)

    @classmethod
    def of(
        cls, hardware: Hardware, profile: Profile, seed: int, device_id: str, trace: StateTrace | None = None,
        phase_s: float = 0.0,
    ) -> Readiness:  # fmt: skip
        """Returns the readiness of a device of an experiment.

        A state trace says when the device charges and is idle; without one, habits are drawn from (seed, device).

        Args:
            hardware: The experiment's section.
            profile: The device's hardware.
            seed, device_id: What habits are drawn from.
            trace: The device's state trace, if any.
            phase_s: Where in the trace it begins.

        Raises:
            UserError: `train_when` is `trace` and there is no state trace.
        """
        when = hardware.train_when
        if when == "always":
            return cls(ALWAYS, ALWAYS)
        if when == "schedule":
            return cls(Remembered(Daily(seed, device_id, "schedule", hardware.train_hours, jitter_s=0.0)), ALWAYS)
        drawn = None
        if trace is not None:
            charging, idle, wifi = (
                Windows(windows, period_s=trace.period_s, phase_s=phase_s)
                for windows in (trace.charging, trace.idle, trace.wifi)
            )
        else:
            drawn = OnOff(seed, device_id, IDLE_S, USE_S, purpose="idle")
            charging, idle, wifi = _habits(profile, seed, device_id, drawn)
        if when == "trace":
            if trace is None:
                raise UserError(
                    'hardware.train_when = "trace" needs state traces (FLASH) in network.traces, with network.kind = '
                    '"trace". Or choose one of always, idle, charging, battery, schedule'
                )
            return cls(Remembered(all_of([charging, idle, wifi])), charging, None, drawn)
        threshold = None if profile.on_mains else hardware.battery_threshold
        if when == "charging":
            return cls(Remembered(all_of([charging, idle])), charging, None, drawn)
        return cls(Remembered(idle) if when == "idle" else ALWAYS, Remembered(charging), threshold, drawn)


def _habits(profile: Profile, seed: int, device_id: str, used: OnOff) -> tuple[Spells, Spells, Spells]:
    if profile.on_mains:
        return ALWAYS, ALWAYS, ALWAYS
    charging = Daily(seed, device_id, "charge", CHARGE_HOURS, CHARGE_JITTER_S)
    asleep = Daily(seed, device_id, "sleep", SLEEP_HOURS, SLEEP_JITTER_S)
    return charging, Either(asleep, used), ALWAYS


@dataclass(slots=True)
class Body:
    """The physical state of a device: battery (0 to 1), warmth (0 to 1)."""

    time_s: float = 0.0
    battery: float = 1.0
    warmth: float = 0.0


@dataclass(slots=True)
class Done:
    """A piece of work: begun (None: never), ended (inf: never), seconds under load, what they would have been on a cool
    device, and how the device is then.
    """

    begun_s: float | None
    end_s: float
    load_s: float
    cool_s: float
    body: Body


def rest(body: Body, until_s: float, profile: Profile, readiness: Readiness) -> Body:
    """Returns the device's state later, after usual use only: it cools, drains and charges."""
    if until_s <= body.time_s:
        return body
    warmth = cooled(body.warmth, until_s - body.time_s, profile.cooling_s or profile.heating_s)
    battery, now_s = body.battery, body.time_s
    if readiness.threshold is not None:
        while now_s < until_s:
            charging, change_s = readiness.charging.at(now_s)
            step_s = min(change_s, until_s) - now_s
            rate = profile.charge_w / profile.battery_wh if charging else -DAY_USE
            battery = min(1.0, max(0.0, battery + rate * step_s / HOUR_S))
            now_s += step_s
    return Body(until_s, battery, warmth)


def work(
    start_s: float, work_s: float, body: Body, profile: Profile, readiness: Readiness, stop_s: float = math.inf
) -> Done:
    """Does `work_s` seconds of work (of a cool device) from `start_s` on, whenever allowed: pausing, cooling, resuming.

    Given up at `stop_s` (end_s is inf then, and the load so far counts). A battery gives `work_w` to a cool device and
    less to a slower one.
    """
    horizon_s = min(start_s + FOREVER_S, stop_s)
    now_s, begun_s, load_s, cool_s = start_s, None, 0.0, 0.0
    while True:
        free_s = next_up(readiness.allowed, now_s, horizon_s)
        if free_s is None:
            return Done(begun_s, math.inf, load_s, cool_s, rest(body, min(horizon_s, stop_s), profile, readiness))
        body = rest(body, free_s, profile, readiness)
        until_s, drain = up_until(readiness.allowed, free_s, horizon_s), 0.0
        if readiness.threshold is not None:
            charging, change_s = readiness.charging.at(free_s)
            if not charging:
                drain = DAY_USE + profile.work_w / profile.battery_wh
                left_s = (body.battery - readiness.threshold) / drain * HOUR_S
                if left_s <= 1.0:  # wait for the charger
                    plugged_s = next_up(readiness.charging, free_s, horizon_s)
                    now_s = horizon_s if plugged_s is None else plugged_s
                    continue
                until_s = min(until_s, free_s + left_s)
            until_s = min(until_s, change_s)
        until_s = min(until_s, horizon_s)
        begun_s = free_s if begun_s is None else begun_s
        heat = profile.heat(body.warmth)
        need_s = heat.time_for(work_s)
        ends = free_s + need_s <= until_s
        took_s = need_s if ends else until_s - free_s
        did_s = work_s if ends else heat.work_in(took_s)
        load_s, cool_s = load_s + took_s, cool_s + did_s
        battery = body.battery
        if readiness.threshold is not None:
            battery = rest(body, free_s + took_s, profile, readiness).battery  # as if unused
        if drain:
            battery = max(0.0, battery - profile.work_w / profile.battery_wh * did_s / HOUR_S)
        body = Body(free_s + took_s, battery, heated(body.warmth, took_s, profile.heating_s))
        if ends:
            return Done(begun_s, body.time_s, load_s, cool_s, body)
        work_s -= did_s
        now_s = until_s


