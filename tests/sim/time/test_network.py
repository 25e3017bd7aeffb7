"""Links: spells in closed form, transfers as integrals, drops that waste bytes; one device's link is its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.sim.core.clock import DAY_S, HOUR_S, VirtualClock, WallClock
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.virtual_sections import Network
from untether.sim.time.network import ALWAYS, NEVER, Both, Constant, Daily, Link, Links, Log, LoopedLog, OnOff, Windows
from untether.sim.time.network.bandwidth import log_of_rates
from untether.sim.time.network.spells import next_up, seconds_up, thinned, up_until, ups


def name(device: int) -> str:
    return f"device-{device:05d}"


def test_both_clocks_keep_one_interface():
    virtual = VirtualClock(DAY_S)
    virtual.sleep(6.5 * HOUR_S)
    assert virtual.now_s() == 1.2708333333333333 * DAY_S
    assert virtual.timestamp() == "day 2 06:30:00"
    with pytest.raises(ValueError):
        virtual.sleep(-1)
    real = WallClock()
    before = real.now_s()
    real.sleep(0.0)
    assert real.now_s() >= before and real.timestamp().endswith("+00:00")


# --- spells ---------------------------------------------------------------------------------------------------


def test_windows_by_hand():
    spells = Windows([(10, 20), (30, 40)], period_s=100, phase_s=5)  # so up at 5 to 15 and 25 to 35, every 100 s
    assert [spells.at(t)[0] for t in (0, 5, 14.9, 15, 25, 34, 36, 105, 1_000_005)] == [
        False, True, True, False, True, True, False, True, True,
    ]  # fmt: skip
    assert next_up(spells, 36, 1000) == 105 and next_up(spells, 36, 105) is None
    assert up_until(spells, 107) == 115 and up_until(spells, 20) == 20
    assert seconds_up(spells, 0, 300) == 60 and seconds_up(spells, 7, 27) == 10
    assert list(ups(Windows([(5, 9)], inside_up=False), 0, 20)) == [(0, 5), (9, 20)]
    with pytest.raises(ValueError):
        Windows([(10, 20), (15, 30)])


@given(st.lists(st.floats(0, 999), min_size=2, max_size=20, unique=True), st.floats(0, 500), st.floats(0, 3000))
def test_both_is_up_when_all_are(cuts, phase, time_s):
    cuts = sorted(cuts)[: len(cuts) // 2 * 2]
    one = Windows(list(zip(cuts[::2], cuts[1::2], strict=True)), period_s=1000, phase_s=phase)
    other = OnOff(1, "d", 300, 200)
    both = Both(one, other)
    up, until = both.at(time_s)
    assert up == (one.at(time_s)[0] and other.at(time_s)[0])
    assert until > time_s
    between = max(time_s, until - 1e-6)
    assert (one.at(between)[0] and other.at(between)[0]) == up


@pytest.mark.parametrize("distribution", ["exponential", "constant", "lognormal"])
def test_onoff_keeps_its_means_from_the_first_moment_on(distribution):
    """Stationary: the share up on the first day is that of any day, though spells last three of them."""
    fleet = [OnOff(3, name(d), DAY_S, 3 * DAY_S, distribution) for d in range(1500)]
    first = np.mean([seconds_up(spells, 0, DAY_S) for spells in fleet]) / DAY_S
    later = np.mean([seconds_up(spells, 40 * DAY_S, 41 * DAY_S) for spells in fleet]) / DAY_S
    assert first == pytest.approx(0.25, abs=0.04) and later == pytest.approx(0.25, abs=0.04)
    lengths = [end - start for spells in fleet[:300] for start, end in ups(spells, 0, 400 * DAY_S) if start > 0]
    assert np.mean(lengths) == pytest.approx(DAY_S, rel=0.05)
    if distribution == "constant":
        assert min(lengths[:-1]) >= 0 and np.median(lengths) == pytest.approx(DAY_S)


def test_rhythm_follows_the_hour():
    fleet = [OnOff(3, name(d), 600, 600, rhythm=0.8, quiet_hour=3) for d in range(600)]
    for hour in (3, 9, 15):
        window = [(day * DAY_S + hour * HOUR_S, day * DAY_S + (hour + 1) * HOUR_S) for day in (1, 2, 3)]
        share = np.mean([seconds_up(spells, *w) for spells in fleet for w in window]) / HOUR_S
        kept = 1 - 0.8 * (1 + math.cos(2 * math.pi * (hour + 0.5 - 3) / 24)) / 2
        assert share == pytest.approx(0.5 * kept, abs=0.03)


@given(st.lists(st.floats(0, 90 * DAY_S), min_size=1, max_size=8), st.floats(0, 90 * DAY_S))
@settings(max_examples=30, deadline=None)
def test_asking_and_forgetting_change_no_spell(times, forget_s):
    """Whatever was asked before, in whatever order, and whatever was dropped: the same state at the same time."""
    fresh = {time: OnOff(7, "d", 1200, 1200).at(time) for time in times}
    used = OnOff(7, "d", 1200, 1200)
    for time in times:
        assert used.at(time) == fresh[time]
        used.forget(forget_s)
    assert [used.at(time) for time in reversed(times)] == [fresh[time] for time in reversed(times)]


def test_old_spells_are_dropped():
    spells = OnOff(7, "d", 1200, 1200)
    sizes = []
    for day in range(60):
        spells.at((day + 1) * DAY_S)
        spells.forget(day * DAY_S)
        sizes.append(len(spells._edges))
    assert max(sizes[10:]) < 1000


def test_daily_opens_about_when_told():
    fleet = [Daily(1, name(d), "wifi", (19, 7)) for d in range(400)]
    starts = [next_up(spells, (5 * 24 + 12) * HOUR_S, math.inf) / HOUR_S - 5 * 24 for spells in fleet]
    assert np.mean(starts) == pytest.approx(19, abs=0.2) and np.std(starts) == pytest.approx(1, abs=0.15)
    assert all(spells.at(5 * DAY_S + HOUR_S)[0] and not spells.at(5 * DAY_S + 13 * HOUR_S)[0] for spells in fleet)
    assert seconds_up(Daily(1, "d", "x", (8, 18), jitter_s=0), 0, 10 * DAY_S) == pytest.approx(100 * HOUR_S)


# --- transfers ------------------------------------------------------------------------------------------------


def test_transfer_by_hand():
    link = Link(Windows([(0, 10), (20, 30)]), Constant(8e6), Constant(8e5), 0.1)
    sent = link.transfer(2, 3e6, "down")  # 1 MB a second
    assert (sent.end_s, sent.sent_bytes, sent.dropped) == (5, 3e6, False)
    sent = link.transfer(2, 3e6, "up")  # 0.1 MB a second: 8 s of link are left
    assert (sent.end_s, sent.sent_bytes, sent.dropped) == (10, pytest.approx(8e5), True)
    exact = link.transfer(2, 8e6, "down")  # the last bit and the end of the spell together
    assert exact.end_s == 10 and not exact.dropped


def test_a_looped_log_by_hand():
    log = Log("by hand", (0.0, 1.0, 2.0, 4.0), (0.0, 10.0, 10.0, 30.0))  # 10, 0, 10 bit/s, and again
    looped = LoopedLog(log, phase_s=0.5, scale=2.0)
    assert looped.bits(0, 0.5) == 10 and looped.bits(0, 1.5) == 10 and looped.bits(0, 4) == 60
    assert looped.done(0, 10) == 0.5  # the silence after it is not waited for
    assert looped.done(0, 10.2) == pytest.approx(1.51)
    assert looped.done(0, 600) == pytest.approx(40)
    assert looped.bits(123.4, 567.8) == pytest.approx(60 * 111 + looped.bits(123.4 + 444, 567.8))


def test_a_log_begins_at_nothing_and_lets_no_bit_pass_in_no_time():
    for times, bits in (((0.0, 5.0), (12.0, 24.0)), ((0.0, 1.0, 1.0), (0.0, 1.0, 2.0)), ((0.0, 0.0), (0.0, 0.0)),
                        ((0.0, 2.0, 1.0), (0.0, 1.0, 2.0)), ((0.0, 1.0), (0.0, -1.0))):  # fmt: skip
        with pytest.raises(ValueError, match="begin at 0"):
            Log("broken", times, bits)
    assert log_of_rates("", [1.0, 0.0, 2.0], [5.0, 9.0, 1.0], None).bits == (0, 5, 7)


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 1e6)), min_size=1, max_size=12).filter(
        lambda pieces: sum(rate for _, rate in pieces) > 1
    ),
    st.floats(0, 1e5), st.floats(1, 1e7), st.floats(0.1, 3), st.floats(0, 5),
)  # fmt: skip
def test_done_is_when_the_bits_are_through(pieces, start_s, bits, scale, phase):
    times, sums = [0.0], [0.0]
    for duration, rate in pieces:
        times.append(times[-1] + duration)
        sums.append(sums[-1] + duration * rate)
    looped = LoopedLog(Log("", tuple(times), tuple(sums)), phase, scale)
    end_s = looped.done(start_s, bits)
    assert looped.bits(start_s, end_s) == pytest.approx(bits, rel=1e-6, abs=1e-3)


# --- fleets ---------------------------------------------------------------------------------------------------


def states(links: Links, devices, times=(0.0, 5e4, 3e5)) -> dict:
    return {(d, t): links.of(d, name(d)).spells.at(t) for d in devices for t in times}


@given(st.permutations(range(12)), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_order_and_company_change_no_link(order, some):
    network = Network(availability=0.6, wifi_only=True, outages=("10h+20h:50%",))
    alone = states(Links(network, 5), sorted(order[:some]))
    assert states(Links(network, 5), order[:some]) == alone
    assert {key: value for key, value in states(Links(network, 5), range(12)).items() if key in alone} == alone


def test_availability_is_one_knob():
    assert Links(Network(), 1).of(0, name(0)).spells is ALWAYS
    assert Links(Network(availability=0), 1).of(0, name(0)).spells is NEVER
    links = Links(Network(availability=0.2, mean_down_s=3600), 1)
    share = np.mean([links.of(d, name(d)).seconds_up(0, 20 * DAY_S) for d in range(200)]) / (20 * DAY_S)
    assert share == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("distribution", ["exponential", "constant", "lognormal"])
@pytest.mark.parametrize("kind", ["always", "onoff"])
@pytest.mark.parametrize("rhythm", [0.0, 0.5, 1.0])
def test_availability_is_the_share_of_whole_days_whatever_the_rhythm(distribution, kind, rhythm):
    """A fleet's mean over whole days; the spread between its devices says how exact that is."""
    for availability in (0.05, 0.5, 0.75, 0.99):
        network = Network(
            kind=kind, availability=availability, rhythm=rhythm, distribution=distribution, mean_down_s=1000,
            quiet_hour=2,
        )  # fmt: skip
        links = Links(network, 3)
        shares = [links.of(d, name(d)).seconds_up(0, 4 * DAY_S) / (4 * DAY_S) for d in range(120)]
        error = max(np.std(shares) / math.sqrt(len(shares)), 1e-4)
        assert abs(np.mean(shares) - availability) < 4 * error < 0.04, availability


@given(st.floats(0.001, 0.999), st.floats(0, 1), st.floats(0, 23.9))
def test_what_the_rhythm_takes_is_given_back(availability, rhythm, quiet_hour):
    base, spared = thinned(availability, rhythm)
    spells = OnOff(1, "d", base, 1 - base, rhythm=rhythm, quiet_hour=quiet_hour, spared=spared)
    lost = spells._loss((np.arange(20_000) + 0.5) / 20_000 * DAY_S)
    assert availability <= base <= (1 + availability) / 2 + 1e-12 and lost.min() >= 0
    assert base * (1 - lost.mean()) == pytest.approx(availability, rel=1e-5)
    if spared == 1:
        assert lost.max() == pytest.approx(rhythm, abs=1e-6)


def test_the_first_day_has_the_rhythm_of_any_other():
    """Spells of days: the one around the first midnight began at some hour too."""
    network = Network(availability=0.4, rhythm=1.0, mean_down_s=1.5 * DAY_S, quiet_hour=0)
    links = Links(network, 1)
    for day in (0, 9):
        up_s = [links.of(d, name(d)).seconds_up(day * DAY_S, (day + 1) * DAY_S) for d in range(2500)]
        assert np.mean(up_s) / DAY_S == pytest.approx(0.4, abs=0.03)


def test_what_comes_on_top_of_availability():
    """Up when spells, Wi-Fi hours and outages allow it: shares multiply, where no rhythm ties them together."""
    def share(**fields) -> float:
        links = Links(Network(availability=0.6, **fields), 2)
        return np.mean([links.of(d, name(d)).seconds_up(DAY_S, 11 * DAY_S) for d in range(100)]) / (10 * DAY_S)

    assert share(wifi_only=True, wifi_hours=(20, 2)) == pytest.approx(0.6 / 4, abs=0.012)
    assert share(outages=("1d+2d", "5d+3d:50%")) == pytest.approx(0.6 * (1 - 0.2 - 0.15), abs=0.03)


def test_outages_meet_whom_they_should():
    links = Links(Network(outages=("1h+1h", "90m+2h:3-5", "10h+1h:25%")), 1)
    hours = (0.5, 1.5, 3, 10.5)
    down = {hour: sum(not links.of(d, name(d)).is_up(hour * HOUR_S) for d in range(400)) for hour in hours}
    assert (down[0.5], down[1.5], down[3]) == (0, 400, 3)
    assert down[10.5] == pytest.approx(100, abs=35)


def test_scale_speeds_every_link_up():
    slow, fast = (Links(Network(scale=s), 1).of(0, name(0)).transfer(0, 1e6, "down").end_s for s in (1, 4))
    assert slow == pytest.approx(4 * fast) and slow == pytest.approx(8 / 28.8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network.availability": "1.5"}, "network.availability"),
        ({"network.outages": "6h"}, "start+length"),
        ({"network.outages": "6h+0h"}, "length above 0"),
        ({"cloud.capacity.outages": "6h+1h:10%"}, "network.outages"),
        ({"network.kind": "trace"}, "needs network.traces"),
        ({"network.traces": "x"}, "is not read"),
        ({"network.wifi_hours": "7,7"}, "two different hours"),
    ],
)
def test_mistakes_are_named(settings, said):
    with pytest.raises(UserError, match="not a valid experiment") as error:
        Experiment.read(None, settings)
    assert said in str(error.value)
