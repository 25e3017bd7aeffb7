"""What the rows of `events` say of a fleet: by hand, against the timeline's own counts, and against SciPy's curve."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.timelines import HARD, SIZE, asks, timeline, works
from untether.sim.experiment.virtual_sections import CloudCapacity
from untether.sim.run.tables import TABLES
from untether.sim.time import asking
from untether.sim.time.service import (
    attempts,
    cost,
    first_live,
    reached_s,
    share_rate_limited,
    survival,
    throughput_per_s,
    trainings,
    waiting_s,
    wasted,
)


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


@pytest.mark.parametrize("seed", range(3))
def test_rows_and_attempts_agree(seed):
    """The table says of bytes, tokens and waits what the timeline's own attempts say."""
    virtual = timeline(seed=seed, **HARD)
    plan = virtual.plan(0, asks(0, range(30), each=2))
    schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, SIZE), works(0, range(30), 2))
    events = pd.DataFrame(list(virtual.event_rows(schedule))).assign(seed=seed)
    tried = [attempt for attempt in schedule.attempts if attempt.outcome not in ("offline", "over_budget")]
    assert len(attempts(events)) == len(tried)
    own, rows = asking.traffic(schedule.attempts, math.inf), wasted(events, "collaborative")
    assert rows["bytes"].sum() == pytest.approx(own.sent, abs=len(tried)), "rounded to whole bytes"
    assert rows["bytes_wasted"].sum() == pytest.approx(own.wasted, abs=len(tried)) and own.wasted > 0
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
    made = trainings(events, "collaborative")
    devices = pd.DataFrame({"seed": 1, "device_id": list("abcd")})
    first = first_live(made[made["on"] == "samples"], devices, 100.0)
    curve = survival(first["time_s"], first["seen"])
    assert curve["time_s"].tolist() == [0, 10, 20] and curve["share"].tolist() == pytest.approx([1, 0.75, 0.5])
    assert [reached_s(curve, share) for share in (0.25, 0.5, 0.9)] == [10, 20, math.inf]
    early = first_live(made[made["on"] == "samples"], devices, 15.0)
    assert early["seen"].sum() == 1


def test_the_same_device_of_two_seeds_is_two():
    made = trainings(frame(train("a", 10), {**train("a", 20), "seed": 2}), "collaborative")
    devices = pd.DataFrame({"seed": [1, 2], "device_id": "a"})
    first = first_live(made, devices, 100.0)
    assert reached_s(survival(first["time_s"], first["seen"]), 1.0) == 20


def test_survival_by_hand():
    """Of five, one at 1, one of two at 2 (the other is lost then), one at 3, the last lost at 4."""
    curve = survival([1, 2, 2, 3, 4], [True, True, False, True, False])
    assert list(curve["time_s"]) == [0, 1, 2, 3]
    assert curve["share"].tolist() == pytest.approx([1, 4 / 5, 4 / 5 * 3 / 4, 4 / 5 * 3 / 4 * 1 / 2])
    # Greenwood at 2: 1/(5*4) + 1/(4*3) = 2/15; log-log: 0.6 ** exp(+-1.96 sqrt(2/15) / log 0.6)
    apart = 1.959964 * math.sqrt(2 / 15) / abs(math.log(0.6))
    row = curve.iloc[2]
    assert (row["low"], row["high"]) == pytest.approx((0.6 ** math.exp(apart), 0.6 ** math.exp(-apart)))
    assert row["low"] == pytest.approx(0.1257, abs=1e-4) and row["high"] == pytest.approx(0.8818, abs=1e-4)
    assert reached_s(curve, 0.5) == 3 and math.isinf(reached_s(curve[:3], 0.5))
    assert survival([5, 5], [True, True])["share"].tolist() == [1, 0]
    assert survival([5, 5], [False, False])["share"].tolist() == [1]


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40))
def test_the_curve_is_scipys(waits):
    times, came = zip(*waits, strict=True)
    curve = survival(times, came)
    data = scipy.stats.CensoredData(
        uncensored=[t for t, c in waits if c], right=[t for t, c in waits if not c]
    )  # fmt: skip
    other = scipy.stats.ecdf(data).sf
    for time, waiting in zip(curve["time_s"], curve["share"], strict=True):
        if time > 0:
            assert waiting == pytest.approx(float(other.evaluate(time)), abs=1e-12)
    assert reached_s(curve, 1.0) == max(times) or not all(came)
