"""Links between devices and the cloud: when they are up, how fast they are, and what becomes of a transfer."""

from sim.network.bandwidth import Bandwidth, Constant, Log, LoopedLog
from sim.network.link import Link, Transfer
from sim.network.links import Links
from sim.network.spells import ALWAYS, NEVER, Both, Daily, OnOff, Spells, Windows
from sim.network.traces import StateTrace, read_trace, read_traces

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
