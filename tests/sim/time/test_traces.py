"""Trace formats, recognised and validated; the real logs against an integration of their own."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.sim.timelines import run, timeline
from untether.sim.core.clock import DAY_S, HOUR_S
from untether.sim.core.errors import UserError
from untether.sim.experiment.virtual_sections import Network
from untether.sim.time.network import Links, Log, LoopedLog, StateTrace, read_trace, read_traces

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


def walk(parts: list[tuple[float, float]], start_s: float, size_bits: float) -> float:
    """How long a transfer takes on a looped log, walked piece by piece."""
    start_s, now = start_s % sum(d for d, _ in parts), 0.0
    index, left = 0, size_bits
    while True:
        duration, rate = parts[index % len(parts)]
        begin = max(now, start_s)
        if now + duration > start_s:
            passes = (now + duration - begin) * rate
            if passes >= left * (1 - 1e-9):
                return begin + left / rate - start_s
            left -= passes
        now, index = now + duration, index + 1


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
    assert log.times_s == (0, 0.001, 0.002, 0.004, 0.005) and log.bits == (0, 0, 24_000, 24_000, 48_000)
    looped = LoopedLog(log)
    assert looped.done(0, 12_000) == pytest.approx(0.0015) and looped.done(0, 24_000) == 0.002
    assert looped.done(0, 24_001) > 0.004, "the silence between the slots is one"
    assert looped.done(0, 48_000) == looped.done(0.005, 48_000) - 0.005 == 0.005


def delivered(slots: list[int], until_ms: int) -> int:
    """Packets that mahimahi's `LinkQueue` lets pass after 0 and until then, its own loop: each slot at the base time
    plus its millisecond; after the last one, the base time grows by that.
    """
    index, base, count = 0, 0, 0
    while base + slots[index] <= until_ms:
        count += base + slots[index] > 0
        index += 1
        if index == len(slots):
            index, base = 0, base + slots[-1]
    return count


MILLISECONDS = st.lists(st.integers(0, 40), min_size=1, max_size=15).map(sorted).filter(lambda slots: slots[-1] > 0)


@given(MILLISECONDS, st.integers(0, 300))
@example([0, 5], 5)
@example([0, 0, 3, 3], 0)
def test_as_many_bits_at_each_millisecond_as_packets_in_mahimahi(tmp_path_factory, slots, until_ms):
    file = tmp_path_factory.getbasetemp() / "slots"
    (log,) = read_trace(write(file, "".join(f"{slot}\n" for slot in slots)))
    assert log.duration_s == slots[-1] / 1000 and log.bits[-1] == 12_000 * len(slots)
    looped = LoopedLog(log)
    packets = delivered(slots, until_ms)
    assert looped.bits(0, until_ms / 1000) == pytest.approx(12_000 * packets, abs=1e-3)
    if packets:  # the packet's millisecond is the first at which so many have passed
        first = next(ms for ms in range(until_ms + 1) if delivered(slots, ms) >= packets)
        end_s = looped.done(0, 12_000 * packets)
        assert end_s == pytest.approx(first / 1000, abs=1e-9)
        assert looped.done(0, 12_000 * packets - 6000) > (first - 1) / 1000 - 1e-9


FILES = {
    "mahimahi": MILLISECONDS.map(lambda slots: "".join(f"{slot}\n" for slot in slots)),
    "pensieve": st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 0.5, 3])), min_size=2, max_size=9).map(
        lambda rows: "".join(f"{sum(d for d, _ in rows[:i])} {rate}\n" for i, (_, rate) in enumerate(rows))
    ),
    "sabre": st.lists(st.tuples(st.integers(1, 4000), st.sampled_from([0, 0, 1, 700])), min_size=1, max_size=9).map(
        lambda rows: json.dumps([{"duration_ms": d, "bandwidth_kbps": r, "latency_ms": 1} for d, r in rows])
    ),
}


def pieces(form: str, text: str) -> list[tuple[float, float]]:
    """(seconds, bits a second), read from the text without the reader."""
    if form == "sabre":
        return [(item["duration_ms"] / 1000, item["bandwidth_kbps"] * 1000) for item in json.loads(text)]
    if form == "pensieve":
        rows = [tuple(map(float, line.split())) for line in text.splitlines()]
        lasts = [after[0] - before[0] for before, after in zip(rows, rows[1:], strict=False)]
        return [(last, rate * 1e6) for last, (_, rate) in zip([*lasts, lasts[-1]], rows, strict=True)]
    slots = [int(line) for line in text.split()]
    counts = [sum(slot == ms or (ms == slots[-1] and slot == 0) for slot in slots) for ms in range(1, slots[-1] + 1)]
    return [(0.001, count * 12_000_000) for count in counts]


@pytest.mark.parametrize("form", FILES)
@given(data=st.data())
@settings(max_examples=60)
def test_every_transfer_ends_where_a_walk_through_the_file_ends(tmp_path_factory, form, data):
    text = data.draw(FILES[form])
    file, parts = write(tmp_path_factory.getbasetemp() / form, text), pieces(form, text)
    total, period_s = sum(d * rate for d, rate in parts), sum(d for d, _ in parts)
    if not total:
        with pytest.raises(UserError, match="not a bit passes"):
            read_trace(file)
        return
    (log,) = read_trace(file)
    phase, start = (data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) * period_s for _ in range(2))
    scale, loops = data.draw(st.sampled_from([0.5, 1.0, 3.0])), data.draw(st.integers(0, 50))
    start += loops * period_s
    looped = LoopedLog(log, phase, scale)
    assert looped.bits(start, start + period_s) == pytest.approx(total * scale, rel=1e-9)
    shares = data.draw(st.lists(st.sampled_from([1e-6, 0.25, 0.5, 1.0, 1.5, 7.25]), min_size=2, max_size=4))
    ends = [looped.done(start, share * total * scale) for share in sorted(shares)]
    assert ends == sorted(ends) and ends[0] > start
    for share, end in zip(sorted(shares), ends, strict=True):
        assert end - start == pytest.approx(walk(parts, start + phase, share * total), rel=1e-7, abs=1e-6)
        assert looped.bits(start, end) == pytest.approx(share * total * scale, rel=1e-6)
    one, other = (share * total * scale for share in shares[:2])
    assert looped.done(looped.done(start, one), other) == pytest.approx(looped.done(start, one + other), abs=1e-6)


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
        ([SABRE[1], SABRE[1]], ("items 0 to 1", "bandwidth_kbps is always 0", "not a bit passes", "leave it out")),
        ("\n1 0\n2 0.0\n", ("lines 2 to 3", "Mbit/s", "not a bit passes", "network.outages")),
        ("1 2\n", ("line 1", "the only one")),
        ("0\n0\n", ("line 2", "0 ms", "a millisecond at least", "last line")),
        ("1\n\u00b2\n", ("line 2", "no millisecond")),
        ("1\n1" + 400 * "0", ("line 2", "15 digits")),
        ([{**SABRE[0], "bandwidth_kbps": 10**400}], ("a number of 401 digits",)),
        ([{**SABRE[0], "duration_ms": 1e-320}], ("item 0", "above 0")),
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


def test_a_request_over_a_log_with_a_slot_at_0_takes_its_time(tmp_path):
    """From the file to the row of `events`: 4,000 bytes up at 10 Mbit/s to 28.8 of the log, then 2,000 down."""
    text = "0\n300\n300\n"
    network = {"kind": "trace", "traces": str(write(tmp_path / "log", text)), "rtt_s": 0.0, "ask_within_h": 0.0}
    virtual = timeline(network=network)
    schedule = run(virtual, 0, range(20))
    asked = {row["device_id"]: row for row in virtual.event_rows(schedule) if row["kind"] == "augment"}
    assert len(asked) == 20
    for device, row in asked.items():
        (trace,) = virtual.links.traces
        phase_s, parts = virtual.links.phase_s(device, trace), pieces("mahimahi", text)
        up_s = walk(parts, phase_s + row["time_s"], 8 * 4000 * 2.88)
        down_s = walk(parts, phase_s + row["time_s"] + up_s, 8 * 2000)
        assert row["outcome"] == "ok" and row["duration_s"] == pytest.approx(up_s + down_s, abs=1e-6)
        assert row["duration_s"] > 0.6, "three periods, one of them perhaps nearly over"


# --- the real logs --------------------------------------------------------------------------------------------

REAL = os.environ.get("UNTETHER_REAL_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="UNTETHER_REAL_DATA is not set")


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
            assert took_s == pytest.approx(walk(pieces("sabre", file.read_text()), start_s, size), rel=1e-6, abs=1e-6)


@needs_data
def test_ghent_is_as_fast_as_it_is_known_to_be():
    """Median of all samples: 28.8 Mbit/s."""
    slopes = sorted(slope for log in read_traces(Path(REAL) / "traces" / "ghent-4g") for slope in log.slopes)
    assert slopes[len(slopes) // 2] == pytest.approx(28.8e6, rel=0.02)


# --- CSV, and odd files ----------------------------------------------------------------------------------------------

FIVE_G = """Timestamp,Longitude,DL_bitrate,PINGAVG
2019.12.14_13.40.39,-8.4,8000,30
2019.12.14_13.40.40,-8.4,0,-
2019.12.14_13.40.41,-8.4,-,-
2019.12.14_13.40.43,-8.4,16000,50
"""
COLUMNS = {"time": "Timestamp", "down": "DL_bitrate:kbps"}


def test_a_csv_log_is_read_by_its_map(tmp_path):
    (log,) = read_trace(write(tmp_path / "log.csv", FIVE_G), COLUMNS)
    looped = LoopedLog(log)
    assert looped.bits(0, 1) == pytest.approx(8e6) and looped.bits(1, 4) == 0
    assert looped.bits(4, 7) == pytest.approx(3 * 16e6), "the last rate holds as long as the one before"
    seconds = "seq,Throughput,lat\n0,3,10\n0,5,30\n1,2,20\n"
    given = {"time": "seq", "down": "Throughput", "latency": "lat"}
    (log,) = read_trace(write(tmp_path / "lumos.csv", seconds), given)
    assert LoopedLog(log).bits(0, 2) == pytest.approx(4e6 + 2e6) and log.latency_s == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "needs network.columns, which say what its columns are: Timestamp, Longitude, DL_bitrate, PINGAVG"),
        ({"time": "Timestamp"}, "which is `down`"),
        ({"time": "Timestamp", "down": "UL"}, "unknown column `UL`"),
        ({"time": "Timestamp", "down": "DL_bitrate:mbit"}, "unknown unit `mbit`"),
        ({"when": "Timestamp", "down": "DL_bitrate"}, "unknown column `when`"),
        ({"time": "Timestamp", "down": "Longitude"}, "line 2: Longitude = `-8.4`"),
    ],
)
def test_a_map_that_cannot_be_followed_is_named(tmp_path, columns, words):
    with pytest.raises(UserError) as error:
        read_traces(write(tmp_path / "log.csv", FIVE_G), columns)
    assert words in str(error.value)


def test_odd_files_among_logs_are_left_out_and_named_once(tmp_path):
    write(tmp_path / "a.log", "0.5 4.0\n1.5 2.0\n")
    write(tmp_path / "Makefile", "all: a.log\n\techo make the logs\n")
    write(tmp_path / "notes", "what I did on that day\nand then some\n")
    write(tmp_path / "README", "about them")
    with pytest.warns(UserWarning, match="left out.*Makefile and 1 more") as said:
        (log,) = read_traces(tmp_path)
    assert len(said) == 1 and log.name == "a.log"
