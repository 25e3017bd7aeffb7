"""Work on a device that pauses, heats up and runs on a battery: by hand, and as a property."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.time.hardware import built_in
from untether.sim.time.network import ALWAYS, NEVER, Windows
from untether.sim.time.readiness import DAY_USE, Body, Either, Readiness, rest, work

COOL = replace(built_in()["pixel-8"], hot_share=1.0, knee=0.0, battery_wh=10.0, load_w=6.0, idle_w=1.0, charge_w=10.0)
"""Never throttles; ten watt-hours: training at 5 W above idle empties half of it an hour,
beside the usual use; charging at 10 W fills it in one."""


def test_pauses_by_hand():
    ready = Readiness(Windows([(100, 200), (300, 400), (1000, 2000)]), ALWAYS)
    done = work(0, 250, Body(), COOL, ready)
    assert (done.begun_s, done.end_s, done.load_s) == (100, 1050, 250)
    assert work(0, 50, Body(), COOL, Readiness(ALWAYS, ALWAYS)).end_s == 50
    never = work(0, 50, Body(), COOL, Readiness(NEVER, ALWAYS))
    assert never.begun_s is None and never.end_s == math.inf and never.load_s == 0


def test_work_that_is_called_off():
    done = work(0, 250, Body(), COOL, Readiness(ALWAYS, ALWAYS), stop_s=70)
    assert (done.begun_s, done.end_s, done.load_s, done.body.time_s) == (0, math.inf, 70, 70)


def test_the_battery_pauses_work_until_the_charger():
    """From full down to half: at (5 W / 10 Wh + 0.0375) an hour, 0.93 h; then nothing until hour 10."""
    hour = 3600.0
    ready = Readiness(ALWAYS, Windows([(10 * hour, 20 * hour)]), threshold=0.5)
    first_s = 0.5 / (0.5 + DAY_USE) * hour
    done = work(0, 2 * hour, Body(), COOL, ready)
    assert done.load_s == pytest.approx(2 * hour)
    assert done.end_s == pytest.approx(10 * hour + 2 * hour - first_s)
    exact = work(0, first_s, Body(), COOL, ready)
    assert exact.end_s == pytest.approx(first_s) and exact.body.battery == pytest.approx(0.5)


def test_a_hot_device_takes_less_power():
    """At half its speed 5 W become 2.5 W: an hour of cool work costs 5 Wh whatever time it takes."""
    hot = replace(COOL, hot_share=0.5, heating_s=1e-3)
    for phone, took_h in ((COOL, 1), (hot, 2)):
        done = work(0, 3600, Body(), phone, Readiness(ALWAYS, NEVER, threshold=0.1))
        assert done.cool_s == 3600 and done.load_s == pytest.approx(took_h * 3600, rel=1e-4)
        assert done.body.battery == pytest.approx(1 - 0.5 - took_h * DAY_USE, rel=1e-4)


def test_rest_drains_and_charges():
    hour = 3600.0
    ready = Readiness(ALWAYS, Windows([(10 * hour, 20 * hour)]), threshold=0.5)
    assert rest(Body(), 10 * hour, COOL, ready).battery == pytest.approx(1 - 10 * DAY_USE)
    assert rest(Body(), 10.1 * hour, COOL, ready).battery == pytest.approx(1 - 10 * DAY_USE + 0.1)
    assert rest(Body(), 15 * hour, COOL, ready).battery == 1
    assert rest(Body(), 100 * hour, COOL, ready).battery == 0


def test_heat_slows_and_a_pause_cools():
    phone = replace(COOL, hot_share=0.5, heating_s=100.0)
    steady = work(0, 1000, Body(), phone, Readiness(ALWAYS, ALWAYS))
    paused = work(0, 1000, Body(), phone, Readiness(Windows([(0, 300), (5000, 9000)]), ALWAYS))
    assert 1900 < steady.end_s < 2000 and paused.load_s < steady.load_s
    # hot t + (1 - hot) tau (1 - exp(-t / tau)) = 1000: t = 1900 but for exp(-19)
    assert steady.end_s == pytest.approx(1900, abs=1e-3)


@given(
    st.lists(st.integers(1, 500), min_size=2, max_size=10, unique=True), st.floats(1, 3000), st.floats(0.2, 1),
    st.floats(0, 4000),
)  # fmt: skip
def test_work_fits_its_windows(cuts, seconds, hot, start_s):
    """Windows of ten seconds or more, so that the work is done within FOREVER_S."""
    cuts = [10.0 * cut for cut in sorted(cuts)][: len(cuts) // 2 * 2]
    windows = list(zip(cuts[::2], cuts[1::2], strict=True))
    ready = Readiness(Windows(windows, period_s=5000.0), ALWAYS)
    phone = replace(COOL, hot_share=hot, heating_s=100.0)
    done = work(start_s, seconds, Body(), phone, ready)
    assert done.begun_s >= start_s and seconds - 1e-6 <= done.load_s <= seconds / hot + 1e-6
    allowed = sum(b - a for a, b in windows)
    free = Windows(windows, period_s=5000.0)
    from untether.sim.time.network.spells import seconds_up

    assert seconds_up(free, done.begun_s, done.end_s) == pytest.approx(done.load_s, rel=1e-6, abs=1e-5), allowed


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 300))
def test_either_is_up_when_one_is(first, second, time_s):
    one, other = Windows([(first, first + 30)]), Windows([(second, second + 50)])
    up, until = Either(one, other).at(time_s)
    assert up == (one.at(time_s)[0] or other.at(time_s)[0]) and until > time_s
