"""Timelines of devices that ask and train, and the worlds they do it in: what tests of virtual time share."""

from __future__ import annotations

from untether.sim.experiment import Experiment
from untether.sim.time.asking import Ask, Size
from untether.sim.time.timeline import Schedule, Timeline, TrainedVersion, VirtualWork

SIZE = Size(4000, 2000, 1000, 500)
QUICK = {"downlink_mbps": 1e6, "uplink_mbps": 1e6, "rtt_s": 0.0, "ask_within_h": 0.0}
HARD = {
    "network": {"availability": 0.5, "mean_down_s": 120, "downlink_mbps": 0.01, "uplink_mbps": 0.01,
                "ask_within_h": 0.3},
    "cloud": {"capacity": {"concurrency": 2, "queue": 4, "output_tokens_per_s": 60, "requests_per_minute": 4,
                           "outages": ("10m+10m",)}},
    "hardware": {"train_when": "charging", "profiles": ("pixel-8", "galaxy-a14", "raspberry-pi-5")},
}  # fmt: skip
"""Everything can go wrong: short spells, slow links, few places, a small rate, an outage in the hour of asking."""


def name(device: int) -> str:
    return f"d{device}"


def timeline(state: dict | None = None, seed: int = 1, **sections) -> Timeline:
    return Timeline(Experiment.model_validate(sections), seed, name, state)


def asks(round: int, devices, size: Size = SIZE, each: int = 1, lane: str = "augment") -> list[Ask]:
    return [Ask(f"{lane}-r{round}-{d}+{part}", d, size, lane) for d in devices for part in range(each)]


def works(round: int, devices, each: int = 1) -> list[VirtualWork]:
    return [
        VirtualWork(d, arm, 24, 20_000, needs, 12, 10_000)
        for d in devices
        for arm, needs in (
            ("local", ()), ("collaborative", tuple(f"augment-r{round}-{d}+{part}" for part in range(each))),
        )
    ]  # fmt: skip


def run(virtual: Timeline, round: int, devices, size: Size = SIZE, each: int = 1) -> Schedule:
    plan = virtual.plan(round, asks(round, devices, size, each))
    schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, size), works(round, devices, each))
    virtual.advance(schedule)
    return schedule


def trained(schedule: Schedule, arm: str = "collaborative", device: int = 0) -> list[TrainedVersion]:
    return [version for version in schedule.versions if (version.arm, version.device) == (arm, device)]
