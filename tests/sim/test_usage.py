"""What a simulation takes of this machine is really looked at: its own work, and that of processes it starts."""

import subprocess
import sys

from sim.usage import Usage

HUNGRY = "x = bytearray(200 * 2**20); x[::4096] = b'1' * len(x[::4096]); [i * i for i in range(8_000_000)]"


def test_a_child_counts_with_its_memory_and_its_time(monkeypatch):
    monkeypatch.setattr("sim.usage.LOOK_S", 0.05)
    with Usage() as usage:
        before = usage.facts()
        subprocess.run([sys.executable, "-c", HUNGRY], check=True)
        after = usage.facts()
    assert after["peak_memory_bytes"] - before["peak_memory_bytes"] > 150 * 2**20
    assert after["cpu_s"] - before["cpu_s"] > 0.1
    assert after["wall_s"] >= after["cpu_s"] / 4 > 0


def test_what_was_done_before_is_not_counted():
    sum(i * i for i in range(3_000_000))
    with Usage() as usage:
        assert usage.facts()["cpu_s"] < 0.2
