"""The resources that a simulation takes of this machine: seconds, processor time and memory, over all its processes."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import psutil

from untether.sim.core.clock import WallClock

LOOK_S = 2.0
"""How often memory is looked at."""
_GROWTH = 1.02
"""Growth of the processes' resident memory upon which their shares are measured anew: that costs milliseconds a
process, during which it can map no memory."""


class Usage:
    """Watches this process and all its descendants (Flower, Ray, workers) within the `with` block.

    Memory is the sum of each process's own and its share of what is shared (PSS; RSS where the system does not report
    it), at the moments when the sum of all resident memory had grown. Processor time misses what a process did between
    the last sample and its death. Nodes of a cluster that was joined are not seen.
    """

    def __init__(self) -> None:
        self._clock, self._over = WallClock(), threading.Event()
        self._cpu_s: dict[tuple[int, float], tuple[float, float]] = {}
        self._resident_bytes = self._peak_bytes = 0
        self._begun_s = self._clock.now_s()
        self._lock, self._begun = threading.Lock(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self._look()
        self._begun = True
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def facts(self) -> dict[str, Any]:
        """Returns `wall_s`, `cpu_s`, `peak_memory_bytes`, so far."""
        self._look()
        cpu_s = sum(last - first for first, last in self._cpu_s.values())
        wall_s = self._clock.now_s() - self._begun_s
        return {"wall_s": round(wall_s, 3), "cpu_s": round(cpu_s, 3), "peak_memory_bytes": self._peak_bytes}

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        here = psutil.Process()
        with self._lock:
            processes = [here, *here.children(recursive=True)]
            resident = sum(map(self._resident, processes))
            if resident > self._resident_bytes * _GROWTH:
                self._resident_bytes = resident
                self._peak_bytes = max(self._peak_bytes, sum(map(_share, processes)))

    def _resident(self, process: psutil.Process) -> int:
        """Bytes of a process (0: it is gone), its processor time noted."""
        try:
            resident, times = process.memory_info().rss, process.cpu_times()
            key = (process.pid, process.create_time())
        except psutil.Error:
            return 0
        spent_s = times.user + times.system
        before_s = 0.0 if self._begun else spent_s  # what runs already has a past that is not this run's
        self._cpu_s[key] = (self._cpu_s.get(key, (before_s, 0.0))[0], spent_s)
        return resident


def _share(process: psutil.Process) -> int:
    """Bytes, what is shared counted in parts (0: the process is gone)."""
    try:
        full = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(full, "pss", full.rss)
