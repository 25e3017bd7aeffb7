"""What a simulation takes of this machine: seconds, processor time and memory, over all of its processes."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import psutil

from sim.clock import WallClock

LOOK_S = 2.0
"""How often memory is looked at: a look costs some milliseconds a process."""


class Usage:
    """Watches this process and all that came of it (Flower, Ray, workers) while the `with` lasts.

    Memory is the sum of what each process has for itself plus its share of what is shared (PSS; where the system does
    not tell, RSS). Processor time misses what a process did after the last look before its death. Nodes of a cluster
    that was joined are not seen.
    """

    def __init__(self) -> None:
        self._clock, self._over = WallClock(), threading.Event()
        self._cpu_s: dict[tuple[int, float], tuple[float, float]] = {}
        self._peak_bytes, self._begun_s = 0, self._clock.now_s()
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
        """`wall_s`, `cpu_s`, `peak_memory_bytes`, so far."""
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
            memory = sum(self._of(process) for process in [here, *here.children(recursive=True)])
            self._peak_bytes = max(self._peak_bytes, memory)

    def _of(self, process: psutil.Process) -> int:
        """Bytes of a process (0: it is gone), its processor time noted."""
        try:
            full, times = process.memory_full_info(), process.cpu_times()
            key = (process.pid, process.create_time())
        except psutil.Error:
            return 0
        spent_s = times.user + times.system
        before_s = 0.0 if self._begun else spent_s  # what runs already has a past that is not this run's
        self._cpu_s[key] = (self._cpu_s.get(key, (before_s, 0.0))[0], spent_s)
        return getattr(full, "pss", full.rss)
