"""Links between devices and the cloud: when they are up, how fast they are, and the result of a transfer."""

from untether.sim.time.network.bandwidth import Bandwidth, Constant, Log, LoopedLog
from untether.sim.time.network.link import Link, Transfer
from untether.sim.time.network.links import Links
from untether.sim.time.network.spells import ALWAYS, NEVER, Both, Daily, OnOff, Spells, Windows
from untether.sim.time.network.traces import StateTrace, read_trace, read_traces

__all__ = [
    "ALWAYS",
    "NEVER",
    "Bandwidth",
    "Both",
    "Constant",
    "Daily",
    "Link",
    "Links",
    "Log",
    "LoopedLog",
    "OnOff",
    "Spells",
    "StateTrace",
    "Transfer",
    "Windows",
    "read_trace",
    "read_traces",
]
