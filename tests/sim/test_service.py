"""What the rows of `events` say of a fleet: by hand, against the timeline's own counts, and against SciPy's curve."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sim import asking
from sim.results import TABLES
from sim.sections import CloudCapacity
from sim.service import (
    attempts,
    cost,
    first_adapters,
    share_rate_limited,
    survival,
    throughput_per_s,
    traffic,
    waiting_s,
    wasted_energy_j,
)
from tests.sim.test_timeline import HARD, SIZE, asks, timeline, works


def frame(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame([{"seed": 1, **row} for row in rows], columns=TABLES["events"].names)


def ask(request: str, outcome: str = "ok", **more) -> dict:
    return {"kind": "augment", "request_id": request, "outcome": outcome, "time_s": 0.0, "duration_s": 1.0, **more}


def train(device: str, live_s: float, on: str = "samples", outcome: str = "ok", **more) -> dict:
    return {
        "kind": "train", "arm": "collaborative", "device_id": device, "time_s": live_s - 1, "duration_s": 1.0,
        "outcome": outcome, "detail": f"on {on}, 24 steps", **more,
    }  # fmt: skip


def test_waiting_by_hand():
    events = frame(*[ask(str(i), queued_s=float(i)) for i in range(101)], ask("lost", "dropped"), train("d", 5))
    assert waiting_s(events) == {0.5: 50.0, 0.95: 95.0, 0.99: 99.0}
    assert math.isnan(waiting_s(frame(ask("a", "offline")))[0.5])


def test_throughput_by_hand():
    """Three answers in the first hour and one in the fifth; somebody asked in hours 0, 2 and 4."""
    hour = 3600.0
    events = frame(
        *[ask(str(i), time_s=10.0 * i) for i in range(3)], ask("4", "timeout", time_s=2 * hour),
        ask("5", time_s=4 * hour), ask("6", "offline", time_s=9 * hour),
    )  # fmt: skip
    assert throughput_per_s(events) == (pytest.approx(4 / (3 * hour)), pytest.approx(3 / hour))
    assert throughput_per_s(frame(ask("a", "offline"))) == (0.0, 0.0)


def test_rate_limits_by_hand():
    """Two of four attempts, and one of the two requests that tried."""
    events = frame(ask("a", "rate_limited"), ask("a", "rate_limited"), ask("a"), ask("b"), ask("c", "offline"))
    assert share_rate_limited(events) == (0.5, 0.5)
    assert share_rate_limited(frame()) == (0.0, 0.0)


def test_cost_and_waste_by_hand():
    events = frame(
        ask("a", tokens_in=1000, tokens_out=500, energy_j=3.0),
        ask("b", "timeout", tokens_in=1000, tokens_out=0, energy_j=2.0), ask("c", "offline", energy_j=0.0),
        train("d", 9, energy_j=100.0), train("e", 9, outcome="superseded", energy_j=7.0),
    )  # fmt: skip
    spent = cost(events, CloudCapacity(price_in=2.0, price_out=4.0))
    assert (spent.tokens_in, spent.tokens_out, spent.money) == (2000, 500, pytest.approx(0.006))
    assert wasted_energy_j(events) == 9.0


@pytest.mark.parametrize("seed", range(3))
def test_rows_and_attempts_agree(seed):
    """The table says of bytes, tokens and waits what the timeline's own attempts say."""
    virtual = timeline(seed=seed, **HARD)
    plan = virtual.plan(0, asks(0, range(30), each=2))
    schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, SIZE), works(0, range(30), 2))
    events = pd.DataFrame(virtual.event_rows(schedule))
    tried = [attempt for attempt in schedule.attempts if attempt.outcome not in ("offline", "over_budget")]
    assert len(attempts(events)) == len(tried)
    for at_s in (60.0, 600.0, 1200.0, math.inf):
        own, rows = asking.traffic(schedule.attempts, at_s), traffic(events, at_s)
        for name in ("sent", "received", "wasted", "in_flight"):
            assert getattr(rows, name) == pytest.approx(getattr(own, name), abs=len(tried)), "rounded to whole bytes"
        assert rows.sent == rows.received + rows.wasted + rows.in_flight
    spent = cost(events, CloudCapacity())
    assert spent.tokens_in == sum(attempt.tokens_in for attempt in tried) > 0
    waited = [attempt.queued_s for attempt in tried if attempt.queued_s is not None]
    assert waiting_s(events)[0.95] == pytest.approx(np.quantile(waited, 0.95)) and max(waited) > 0
    limited = [attempt.outcome == "rate_limited" for attempt in tried]
    assert share_rate_limited(events)[0] == pytest.approx(np.mean(limited)) and any(limited)


# --- how long until the first adapter -------------------------------------------------------------------------


def test_first_adapters_by_hand():
    """Four devices: live after 10 and 20 s, one with real data only, one superseded: half of them have one."""
    events = frame(
        train("a", 30), train("a", 10), train("b", 20), train("c", 5, on="real"), train("d", 5, outcome="superseded"),
        train("e", 1, arm="placebo"),
    )  # fmt: skip
    curve = first_adapters(events, 4, 100.0)
    assert curve.times_s.tolist() == [10, 20] and curve.waiting.tolist() == pytest.approx([0.75, 0.5])
    assert (curve.reached_s(0.25), curve.reached_s(0.5), curve.reached_s(0.9)) == (10, 20, None)
    assert first_adapters(events, 4, 15.0).reached_s(0.5) is None
    assert first_adapters(frame(), 4, 15.0).reached_s(0.01) is None
    with pytest.raises(ValueError, match="only 1"):
        first_adapters(events, 1, 100.0)


def test_the_same_device_of_two_seeds_is_two():
    curve = first_adapters(frame(train("a", 10), {**train("a", 20), "seed": 2}), 2, 100.0)
    assert curve.reached_s(1.0) == 20


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40))
def test_the_curve_is_scipys(waits):
    times, came = zip(*waits, strict=True)
    curve = survival(times, came)
    data = scipy.stats.CensoredData(
        uncensored=[t for t, c in waits if c], right=[t for t, c in waits if not c]
    )  # fmt: skip
    other = scipy.stats.ecdf(data).sf
    for time, waiting in zip(curve.times_s, curve.waiting, strict=True):
        assert waiting == pytest.approx(float(other.evaluate(time)), abs=1e-12)
    assert len(curve.times_s) == len(set(t for t, c in waits if c))
