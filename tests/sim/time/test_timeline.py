"""The timeline worked by hand: a finite cloud, fallbacks, training, and rounds that carry over."""

from __future__ import annotations

import math

import pytest

from tests.sim.timelines import QUICK, SIZE, asks, run, timeline, trained, works
from untether.sim.core.clock import DAY_S, HOUR_S
from untether.sim.core.errors import UserError
from untether.sim.time.asking import Ask, Size, traffic
from untether.sim.time.devices.heat import Heat
from untether.sim.time.timeline import Plan, Schedule, Timeline, VirtualWork

# --- a finite cloud, by hand ----------------------------------------------------------------------------------


def ends(plan: Plan | Schedule) -> list[tuple[str, float, int]]:
    return [(final.outcome, round(final.end_s, 3), final.attempts) for final in plan.finals.values()]


def finite(**capacity) -> Timeline:
    extra = {"timeout_s": capacity.pop("timeout_s", 60.0)}
    return timeline(network=QUICK, cloud={"capacity": {"backoff_s": 1.0, **capacity}, **extra})


def test_places_are_queued_for():
    """500 tokens at 50 a second, one place: 10 s each, one after another."""
    plan = finite(concurrency=1, output_tokens_per_s=50).plan(0, asks(0, range(3)))
    assert ends(plan) == [("ok", 10.0, 1), ("ok", 20.0, 1), ("ok", 30.0, 1)]
    assert [round(attempt.queued_s) for attempt in plan.attempts] == [0, 10, 20]
    plan = finite(concurrency=2, output_tokens_per_s=50, prompt_tokens_per_s=200).plan(0, asks(0, range(3)))
    assert ends(plan) == [("ok", 15.0, 1), ("ok", 15.0, 1), ("ok", 30.0, 1)]


def test_a_long_queue_times_out_and_a_full_one_refuses():
    plan = finite(concurrency=1, output_tokens_per_s=50, timeout_s=15, retries=0).plan(0, asks(0, range(3)))
    assert ends(plan) == [("ok", 10.0, 1), ("timeout", 15.0, 1), ("timeout", 15.0, 1)]
    plan = finite(concurrency=1, output_tokens_per_s=50, queue=1, retries=0).plan(0, asks(0, range(3)))
    assert ends(plan) == [("ok", 10.0, 1), ("ok", 20.0, 1), ("server_error", 0.0, 1)]
    assert plan.attempts[0].detail == "queue full"


def test_rate_limits_ask_for_patience_and_get_it():
    """Two a minute: the third is told to wait 30 s, and does."""
    plan = finite(requests_per_minute=2).plan(0, asks(0, range(3)))
    assert [(final.outcome, final.attempts) for final in plan.finals.values()] == [("ok", 1), ("ok", 1), ("ok", 2)]
    assert plan.finals["augment-r0-2+0"].end_s == pytest.approx(30)
    assert plan.finals["augment-r0-2+0"].failed_s == pytest.approx(0, abs=1e-6)
    limited = next(attempt for attempt in plan.attempts if attempt.outcome == "rate_limited")
    assert limited.retry_after_s == pytest.approx(30) and limited.detail == "requests a minute"
    # 1,500 tokens each at 3,000 a minute: the third waits until 1,500 are there again
    plan = finite(tokens_per_minute=3000).plan(0, asks(0, range(3)))
    assert plan.finals["augment-r0-2+0"].end_s == pytest.approx(30)


def test_backoff_doubles_with_jitter_until_the_outage_is_over():
    virtual = finite(outages=("0s+20m",), backoff_s=8, max_backoff_s=1000)
    plan = virtual.plan(0, asks(0, range(50)))
    assert {final.outcome for final in plan.finals.values()} == {"ok"}
    for device in range(50):
        starts = [attempt.start_s for attempt in plan.attempts if attempt.device == device]
        waits = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert all(0.5 * 8 * 2**n <= wait <= 8 * 2**n for n, wait in enumerate(waits))
    firsts = {round(attempt.start_s, 6) for attempt in plan.attempts if attempt.number == 1}
    assert len(firsts) == 50, "jitter keeps them apart"
    few = finite(outages=("0s+20m",), backoff_s=8, retries=2).plan(0, asks(0, [0]))
    assert [(final.outcome, final.attempts) for final in few.finals.values()] == [("unreachable", 3)]


def test_a_budget_ends_the_asking():
    """1,000 prompt tokens at 2 and 500 output tokens at 4 a million: 0.004 a request."""
    virtual = finite(price_in=2, price_out=4, budget=0.01)
    first, second = run(virtual, 0, range(2), each=2), run(virtual, 1, range(2))
    assert {final.outcome for final in first.finals.values()} == {"ok"}
    assert {final.outcome for final in second.finals.values()} == {"over_budget"}
    assert virtual._state.spent["augment"] == {0: pytest.approx(0.008), 1: pytest.approx(0.008)}


def test_places_taken_beyond_midnight_stay_taken():
    virtual = finite(concurrency=1, output_tokens_per_s=50, timeout_s=4 * HOUR_S)
    late = [Ask("late", 0, Size(10, 10, 0, 360_000), at_s=DAY_S - HOUR_S)]  # two hours
    plan = virtual.plan(0, late)
    schedule = virtual.schedule(plan, {"late": late[0].size})
    assert schedule.finals["late"].end_s == pytest.approx(DAY_S + HOUR_S)
    assert traffic(schedule.attempts, DAY_S).in_flight == 20
    virtual.advance(schedule)
    early = virtual.plan(1, asks(1, [1]))
    assert early.finals["augment-r1-1+0"].end_s == pytest.approx(DAY_S + HOUR_S + 10)


def test_a_dropped_transfer_wastes_its_bytes_and_is_tried_again():
    """4,000 bytes at 1,600 bit/s take 20 s; the link goes down after 10."""
    network = {"uplink_mbps": 0.0016, "rtt_s": 0.0, "ask_within_h": 0.0, "outages": ("10s+1h",)}
    plan = timeline(network=network).plan(0, asks(0, [0]))
    first, second = plan.attempts
    assert (first.outcome, first.end_s, first.bytes_up) == ("dropped", 10, pytest.approx(2000))
    assert second.outcome == "ok" and second.start_s == HOUR_S + 10 and second.bytes_up == 4000
    sums = traffic(plan.attempts, math.inf)
    assert (sums.received, sums.wasted) == (6000, pytest.approx(2000))


def test_a_larger_answer_than_expected_may_not_arrive():
    """The plan expected little; the real size does not get through before the link's end: wasted, and no samples."""
    network = {"downlink_mbps": 0.001, "rtt_s": 0.0, "ask_within_h": 0.0, "outages": ("1m+30h",)}
    virtual = timeline(network=network)
    plan = virtual.plan(0, asks(0, [0], Size(10, 100, 10, 10)))
    assert plan.granted == {"augment-r0-0+0"}
    schedule = virtual.schedule(plan, {"augment-r0-0+0": Size(10, 1_000_000, 10, 10)}, works(0, [0]))
    assert schedule.finals["augment-r0-0+0"].outcome == "timeout" and not schedule.received
    assert [version.on for version in trained(schedule)] == ["real"]


def test_answers_keep_what_they_turned_out_to_be():
    virtual = timeline()
    plan = virtual.plan(0, asks(0, range(2)))
    schedule = virtual.schedule(plan, {"augment-r0-0+0": Size(1, 1, 1, 1, "refused")}, works(0, range(2)))
    outcomes = [final.outcome for final in schedule.finals.values()]
    assert outcomes == ["refused", "crashed"] and not schedule.received
    (refused,), (crashed,) = trained(schedule, device=0), trained(schedule, device=1)
    assert (refused.on, crashed.on) == ("samples", "real"), "an answer without samples is an answer; a crash is none"
    with pytest.raises(ValueError, match="not granted"):
        virtual.schedule(plan, {"another": SIZE})


# --- training and answering -----------------------------------------------------------------------------------

GAP = {"ask_within_h": 0.0, "outages": ("0h+10h", "30h+4h")}
DAY = {"queries": "day"}


@pytest.mark.parametrize(
    ("fallback", "at_8", "at_12"),
    [("real_data", "r0-real", "r0-samples"), ("wait", None, "r0-samples"), ("stale_samples", "r0-real", "r0-samples")],
)
def test_fallbacks_and_what_answers_when(fallback, at_8, at_12):
    virtual = timeline(network={**GAP, "fallback": fallback}, hardware=DAY)
    schedule = run(virtual, 0, [0])
    for hour, expected in ((0, None), (8, at_8), (12, at_12)):
        found = virtual.answering(schedule, 0, "collaborative", hour * HOUR_S)
        assert (found and found.name) == expected
    assert virtual.answering(schedule, 0, "collaborative", 0.0) is None  # the frozen base


def test_stale_samples_are_those_that_came_before():
    network = {"ask_within_h": 0.0, "outages": ("24h+10h",), "fallback": "stale_samples"}
    virtual = timeline(network=network, hardware=DAY)
    run(virtual, 0, [0])
    schedule = run(virtual, 1, [0])
    assert [version.on for version in trained(schedule)] == ["stale_samples", "samples"]
    before = virtual.answering(schedule, 0, "collaborative", DAY_S)
    assert before.name == "r0-samples", "yesterday's adapter answers until a new one is live"
    assert virtual.answering(schedule, 0, "collaborative", DAY_S + 2 * HOUR_S).name == "r1-stale_samples"
    assert virtual.answering(schedule, 0, "collaborative", DAY_S + 12 * HOUR_S).name == "r1-samples"


def test_samples_that_come_during_the_fallback_supersede_it():
    network = {"ask_within_h": 0.0, "outages": ("0s+20s",)}
    virtual = timeline(network=network, hardware={"profiles": ("raspberry-pi-4",)})
    schedule = run(virtual, 0, [0])
    first, second = trained(schedule)
    assert (first.on, first.outcome, second.on, second.outcome) == ("real", "superseded", "samples", "ok")
    assert first.energy_j == pytest.approx(3.3 * Heat(0.7, 300).work_in(first.load_s)) and 19 < first.load_s < 21
    assert virtual.answering(schedule, 0, "collaborative", math.inf).on == "samples"


def test_energy_is_what_work_costs_above_an_idle_device():
    """In the rows of `events`: a Pi 5 draws 11.9 W at work and 3 W idle, and 0.7 W more while its radio works. Work
    costs what it costs a cool one: a warm one takes longer at less.
    """
    virtual = timeline(network={"ask_within_h": 0.0, "rtt_s": 0.0}, hardware={"profiles": ("raspberry-pi-5",)})
    rows = list(virtual.event_rows(run(virtual, 0, range(3))))
    costs = {"train": lambda seconds: 8.9 * Heat(0.95, 300).work_in(seconds), "augment": lambda seconds: 0.7 * seconds}
    for kind, cost_j in costs.items():
        found = [row for row in rows if row["kind"] == kind]
        assert found and all(row["energy_j"] == pytest.approx(cost_j(row["duration_s"])) for row in found)


def test_work_crosses_midnight_and_the_next_waits_for_it():
    virtual = timeline(network=QUICK, hardware={**DAY, "profiles": ("raspberry-pi-4",)})
    plan = virtual.plan(0, [])
    long = VirtualWork(0, "local", 2000, 2_000_000)
    schedule = virtual.schedule(plan, {}, [long])
    (first,) = schedule.versions
    assert first.live_s > DAY_S and first.energy_j == pytest.approx(3.3 * Heat(0.7, 300).work_in(first.load_s))
    virtual.advance(schedule)
    (second,) = virtual.schedule(virtual.plan(1, []), {}, [VirtualWork(0, "local", 24, 20_000)]).versions
    assert second.begun_s == first.live_s > DAY_S
    again = virtual.schedule(virtual.plan(1, []), {}, [])
    assert virtual.answering(again, 0, "local", first.live_s - 1) is None
    assert virtual.answering(again, 0, "local", first.live_s + 1) == first


def test_what_does_not_fit_is_an_outcome():
    virtual = timeline(hardware={"profiles": ("galaxy-a14",), "nominal_model": "Qwen2.5-3B"})
    schedule = run(virtual, 0, [0])
    assert {version.outcome for version in schedule.versions} == {"out_of_memory"}
    assert virtual.answering(schedule, 0, "local", math.inf) is None
    quantized = timeline(hardware={"profiles": ("pixel-8",), "nominal_model": "Qwen2.5-3B", "weight_bits": 4})
    assert {version.outcome for version in run(quantized, 0, [0]).versions} == {"ok"}


@pytest.mark.parametrize("when", ["idle", "charging", "battery", "schedule"])
def test_training_keeps_to_its_hours(when):
    virtual = timeline(network=QUICK, hardware={"train_when": when, "train_hours": (1, 5), "profiles": ("iphone-13",)})
    free = run(timeline(network=QUICK, hardware={"profiles": ("iphone-13",)}), 0, range(12))
    schedule = run(virtual, 0, range(12))
    for bound, unbound in zip(schedule.versions, free.versions, strict=True):
        assert bound.outcome == "ok" and bound.live_s >= unbound.live_s - 1e-6
        ready = virtual.readiness(bound.device)
        assert ready.allowed.at(bound.begun_s)[0]
        if when == "schedule":
            assert 1 <= bound.begun_s / HOUR_S % 24 < 5
        if when == "charging":
            assert ready.charging.at(bound.begun_s)[0]


def test_a_trace_that_is_missing_is_told_at_once():
    with pytest.raises(UserError, match="needs state traces"):
        timeline(hardware={"train_when": "trace"})


def test_query_times():
    virtual = timeline(hardware=DAY)
    times = [virtual.query_time_s(2, 5, number) for number in range(200)]
    assert all(2 * DAY_S + 7 * HOUR_S <= time < 2 * DAY_S + 23 * HOUR_S for time in times)
    assert len(set(times)) == 200
    assert timeline().query_time_s(2, 5, 0) == 3 * DAY_S
    assert virtual.answer_s(0, "local", 100, 20) > virtual.answer_s(0, "local", 100, 1) > 0


def test_a_device_that_was_lost_has_no_adapter_of_that_round():
    """The next round must not ask its store for one, and what it had before still answers."""
    virtual = timeline(network=QUICK)
    for round in (0, 1):
        plan = virtual.plan(round, asks(round, (0, 1)))
        schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, SIZE), works(round, (0, 1)))
        virtual.advance(schedule, lost={1} if round else ())
    newest = {
        device: virtual.answering(schedule, device, "local", 10 * DAY_S).round for device in (0, 1)
    }  # fmt: skip
    assert newest == {0: 1, 1: 0}
