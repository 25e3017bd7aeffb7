"""The links of a fleet, made from an experiment's `network` section: one a device, independent of all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from untether.sim.core.clock import Span
from untether.sim.core.kinds import LINKS
from untether.sim.core.seeding import derive, generator
from untether.sim.experiment.virtual_sections import Network
from untether.sim.time.network.bandwidth import Constant, Log, LoopedLog
from untether.sim.time.network.link import Link
from untether.sim.time.network.spells import ALWAYS, NEVER, Daily, OnOff, Spells, Windows, all_of, thinned
from untether.sim.time.network.traces import StateTrace, read_traces

MEGA = 1e6

DRAWN, PASSING = 100_000, 2_000
"""The largest fleet whose links and habits are kept, a few KiB a device; and how many are of a larger one, where they
are drawn again, the same, whenever their device's turn comes.
"""

Maker = Callable[["Links", int, str], Link]
"""What a `network.kind` is: makes a device's link, from the device's number and name. `wifi_only`, `outages`, state
traces and `availability` take their time from whatever it makes.
"""


def configured(links: Links, device: int, device_id: str) -> Link:
    """Returns the link that the fields of `[network]` describe, always up: the kinds `always`, `onoff` and `trace`."""
    network, trace = links.network, links.trace_of(device_id)
    down, up = (Constant(mbps * MEGA * network.scale) for mbps in (network.downlink_mbps, network.uplink_mbps))
    rtt_s = network.rtt_s
    if isinstance(trace, Log):
        phase_s = links.phase_s(device_id, trace)
        down = LoopedLog(trace, phase_s, network.scale)
        up = LoopedLog(trace, phase_s, network.scale * network.uplink_mbps / network.downlink_mbps)
        rtt_s = rtt_s if trace.latency_s is None else trace.latency_s
    return Link(ALWAYS, down, up, rtt_s)


def most_kept(devices: int) -> int:
    """Returns how many devices' links and habits are kept, of a fleet of so many."""
    return devices if devices <= DRAWN else PASSING


class Links:
    """Makes each device's link and keeps it, up to `most` of them. All draws depend on `device_id`, so on no order or
    other device.

    `settings` are the experiment's tables for plug-ins.

    Raises:
        UserError: The traces cannot be read.
    """

    def __init__(
        self, network: Network, seed: int, settings: Mapping[str, Mapping[str, Any]] | None = None, most: int = DRAWN
    ):
        self.network, self.seed, self._most = network, seed, most
        self._maker: Maker = LINKS.bind(network.kind, settings or {})
        self.traces = read_traces(network.traces, network.columns) if network.traces else []
        self.outages = [Span.parse(text) for text in network.outages]
        self._links: dict[int, Link] = {}
        self._drawn: dict[int, OnOff] = {}

    def of(self, device: int, device_id: str) -> Link:
        """Returns the link of one device."""
        if device not in self._links:
            if len(self._links) >= self._most:
                self._links.clear()
                self._drawn.clear()
            self._links[device] = self._make(device, device_id)
        return self._links[device]

    def trace_of(self, device_id: str) -> Log | StateTrace | None:
        """Returns the trace assigned to this device, or None."""
        if not self.traces:
            return None
        return self.traces[derive(self.seed, device_id, "trace") % len(self.traces)]

    def phase_s(self, device_id: str, trace: Log | StateTrace) -> float:
        """Returns where in its trace the device begins; state traces keep their time of day."""
        rng = generator(self.seed, device_id, "phase")
        if isinstance(trace, StateTrace):
            return float(rng.integers(round(trace.period_s / 86_400))) * 86_400
        return float(rng.random() * trace.duration_s)

    def forget(self, before_s: float) -> None:
        """Drops the generated spells that ended before a time."""
        for spells in self._drawn.values():
            spells.forget(before_s)

    def _make(self, device: int, device_id: str) -> Link:
        link, trace = self._maker(self, device, device_id), self.trace_of(device_id)
        spells = all_of([
            link.spells, self._spells(device, device_id), self._traced(device_id, trace), self._wifi(device_id, trace),
            self._outage(device, device_id),
        ])  # fmt: skip
        return replace(link, spells=spells)

    def _spells(self, device: int, device_id: str) -> Spells:
        network = self.network
        if network.kind != "onoff" and network.availability == 1:
            return ALWAYS
        if network.availability == 0:
            return NEVER
        mean_up_s, spared = network.mean_up_s, 1.0
        if network.availability < 1:
            base, spared = thinned(network.availability, network.rhythm)
            mean_up_s = network.mean_down_s * base / (1 - base)
        self._drawn[device] = OnOff(
            self.seed, device_id, mean_up_s, network.mean_down_s, network.distribution, network.rhythm,
            network.quiet_hour, spared=spared,
        )
        return self._drawn[device]

    def _traced(self, device_id: str, trace: Log | StateTrace | None) -> Spells:
        if not isinstance(trace, StateTrace):
            return ALWAYS
        windows = trace.wifi if self.network.wifi_only else trace.connected
        return Windows(windows, period_s=trace.period_s, phase_s=self.phase_s(device_id, trace))

    def _wifi(self, device_id: str, trace: Log | StateTrace | None) -> Spells:
        if not self.network.wifi_only or isinstance(trace, StateTrace):
            return ALWAYS
        return Daily(self.seed, device_id, "wifi", self.network.wifi_hours)

    def _outage(self, device: int, device_id: str) -> Spells:
        windows = sorted(
            (span.start_s, span.end_s)
            for number, span in enumerate(self.outages)
            if (span.first is None or span.first <= device <= span.last)
            and (span.share == 1 or derive(self.seed, device_id, "outage", number) < span.share * 2**63)
        )
        return Windows(merged(windows), inside_up=False) if windows else ALWAYS


def merged(windows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merges sorted windows that touch or overlap."""
    together: list[tuple[float, float]] = []
    for start, end in windows:
        if together and start <= together[-1][1]:
            together[-1] = (together[-1][0], max(end, together[-1][1]))
        else:
            together.append((start, end))
    return together
