"""Trace formats, recognised and validated; the real logs against an integration of their own."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from sim.clock import DAY_S, HOUR_S
from sim.errors import UserError
from sim.network import Links, Log, LoopedLog, StateTrace, read_trace, read_traces
from sim.virtual_sections import Network

SABRE = [
    {"duration_ms": 1000, "bandwidth_kbps": 800, "latency_ms": 20},
    {"duration_ms": 3000, "bandwidth_kbps": 0, "latency_ms": 40},
]
FLASH = {
    "guid": "abc",
    "messages": "\n".join(
        [
            "2020-02-01 22:00:00\tbattery_charged_on", "2020-02-01 22:30:00\twifi", "2020-02-01 23:00:00\tscreen_off",
            "2020-02-02 06:00:00\tscreen_unlock", "2020-02-02 07:00:00\t4g", "2020-02-02 07:30:00\tbattery_charged_off",
            "2020-02-02 08:00:00\t55%", "2020-02-02 20:00:00\tunknown", "2020-02-02 21:00:00\tscreen_lock",
        ]
    ),
}  # fmt: skip


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_sabre(tmp_path):
    (log,) = read_trace(write(tmp_path / "log.json", SABRE))
    assert log.times_s == (0, 1, 4) and log.bits == (0, 8e5, 8e5)
    assert log.latency_s == pytest.approx(0.035)  # (1 x 20 + 3 x 40) / 4 ms
    assert log.mean_bits_per_s == 2e5


def test_pensieve(tmp_path):
    (log,) = read_trace(write(tmp_path / "log", "0.5 4.0\n1.5 2.0\n4.0 1\n"))
    assert log.times_s == (0, 1, 3.5, 6) and log.bits == (0, 4e6, 9e6, 11.5e6) and log.latency_s is None


def test_mahimahi(tmp_path):
    (log,) = read_trace(write(tmp_path / "log.up", "0\n2\n2\n5\n"))
    assert log.times_s == (0, 0.002, 0.005) and log.bits == (12_000, 36_000, 48_000)


def test_flash(tmp_path):
    (trace,) = read_trace(write(tmp_path / "log.json", {"abc": FLASH}))
    assert isinstance(trace, StateTrace) and trace.name == "abc" and trace.period_s == 2 * DAY_S
    hours = {what: [tuple(t / HOUR_S for t in w) for w in getattr(trace, what)] for what in trace.__slots__[2:]}
    assert hours == {
        "connected": [(22.5, 44)], "wifi": [(22.5, 31)], "charging": [(22, 31.5)], "idle": [(0, 30), (45, 48)],
    }  # fmt: skip


def test_flash_states_drive_a_link(tmp_path):
    write(tmp_path / "log.json", FLASH)
    network = {"kind": "trace", "traces": str(tmp_path)}
    for wifi, hours in ((False, 21.5), (True, 8.5)):
        link = Links(Network(wifi_only=wifi, **network), 1).of(0, "d")
        assert link.seconds_up(0, 20 * DAY_S) == pytest.approx(10 * hours * HOUR_S)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{**SABRE[0], "bandwidth_kbps": -1}], ("item 0", "bandwidth_kbps = -1", "0 or above")),
        ([SABRE[0], {**SABRE[1], "duration_ms": 0}], ("item 1", "duration_ms = 0", "above 0")),
        ([{"duration_ms": 10}], ("bandwidth_kbps = None",)),
        ([SABRE[1]], ("not a bit passes",)),
        ("[{]", ("line 1", "not JSON")),
        ('{"a": 1}', ("no trace", "messages")),
        ("1 2\n1 3\n", ("line 2", "does not rise")),
        ("1 2\n2 fast\n", ("line 2", "`fast`", "Mbit/s")),
        ("5\n3\n", ("line 2", "before the line above")),
        ("a b c\n", ("no trace format", "mahimahi")),
        ({"guid": "x", "messages": "yesterday wifi"}, ("device x, line 1", "TAB")),
    ],
)
def test_broken_traces_are_named(tmp_path, content, said):
    file = write(tmp_path / "broken", content)
    with pytest.raises(UserError) as error:
        read_traces(tmp_path)
    for words in (str(file), *said):
        assert words in str(error.value)


def test_folders(tmp_path):
    with pytest.raises(UserError, match="no trace in it"):
        read_traces(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_traces(tmp_path / "none")
    write(tmp_path / "a.json", SABRE)
    write(tmp_path / "LICENSE", "words that are no trace")
    assert [trace.name for trace in read_traces(tmp_path)] == ["a.json"]
    write(tmp_path / "b.json", FLASH)
    with pytest.raises(UserError, match="One kind|one kind"):
        read_traces(tmp_path)


# --- the real logs --------------------------------------------------------------------------------------------

REAL = os.environ.get("UNTETHER_REAL_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="UNTETHER_REAL_DATA is not set")


def by_hand(file: Path, start_s: float, size_bits: float) -> float:
    """The end of a transfer on a looped log, walked piece by piece from the file itself."""
    pieces = [(p["duration_ms"] / 1000, p["bandwidth_kbps"] * 1000) for p in json.loads(file.read_text())]
    start_s, now = start_s % sum(d for d, _ in pieces), 0.0
    index, left = 0, size_bits
    while True:
        duration, rate = pieces[index % len(pieces)]
        begin = max(now, start_s)
        if now + duration > start_s:
            passes = (now + duration - begin) * rate
            if passes >= left:
                return begin + left / rate - start_s
            left -= passes
        now, index = now + duration, index + 1


@needs_data
@pytest.mark.parametrize("folder", ["ghent-4g", "norway-3g"])
def test_transfers_over_the_real_logs(folder):
    files = sorted((Path(REAL) / "traces" / folder).glob("*.json"))
    assert len(files) == {"ghent-4g": 40, "norway-3g": 13}[folder]
    rng = random.Random(1)
    for file in files:
        (log,) = read_trace(file)
        assert isinstance(log, Log)
        assert log.latency_s == pytest.approx({"ghent-4g": 0.02, "norway-3g": 0.1}[folder])
        for _ in range(4):
            start_s, size = rng.uniform(0, 3 * log.duration_s), rng.choice([2e4, 1e6, 3e8])
            took_s = LoopedLog(log).done(start_s, size) - start_s
            assert took_s == pytest.approx(by_hand(file, start_s, size), rel=1e-6, abs=1e-6)


@needs_data
def test_ghent_is_as_fast_as_it_is_known_to_be():
    """Median of all samples: 28.8 Mbit/s."""
    slopes = sorted(slope for log in read_traces(Path(REAL) / "traces" / "ghent-4g") for slope in log.slopes)
    assert slopes[len(slopes) // 2] == pytest.approx(28.8e6, rel=0.02)
