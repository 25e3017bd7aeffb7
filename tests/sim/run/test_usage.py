"""What a simulation takes of this machine is really looked at: its own work, and that of processes it starts."""

import subprocess
import sys
import time

from untether.sim.run.usage import Usage

HUNGRY = """
x = bytearray(200 * 2**20); x[::4096] = b"1" * len(x[::4096]); sum(i * i for i in range(8_000_000))
print("ready", flush=True); input()
"""


def test_a_child_counts_with_its_memory_and_its_time():
    with Usage() as usage:
        before = usage.facts()
        with subprocess.Popen([sys.executable, "-c", HUNGRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            full = usage.facts()
            child.communicate(b"\n")
        after = usage.facts()
    assert full["peak_memory_bytes"] - before["peak_memory_bytes"] > 150 * 2**20
    assert after["peak_memory_bytes"] >= full["peak_memory_bytes"]
    assert after["cpu_s"] - before["cpu_s"] > 0.1 and after["wall_s"] > before["wall_s"]


def test_what_was_done_before_is_not_counted():
    while time.process_time() < 5.0:  # a past of this very process
        sum(i * i for i in range(100_000))
    with Usage() as usage:
        assert usage.facts()["cpu_s"] < 5.0
