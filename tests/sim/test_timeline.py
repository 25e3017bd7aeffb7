"""The timeline: its invariants, a finite cloud worked by hand, fallbacks, and rounds that carry over."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.asking import Ask, Size, traffic
from sim.clock import DAY_S, HOUR_S
from sim.errors import UserError
from sim.experiment import Experiment
from sim.results import TABLES
from sim.timeline import Plan, Schedule, Timeline, Version, Work

SIZE = Size(4000, 2000, 1000, 500)
QUICK = {"downlink_mbps": 1e6, "uplink_mbps": 1e6, "rtt_s": 0.0, "ask_within_h": 0.0}
HARD = {
    "network": {"availability": 0.5, "mean_down_s": 120, "downlink_mbps": 0.01, "uplink_mbps": 0.01,
                "ask_within_h": 0.3},
    "cloud": {"capacity": {"concurrency": 2, "queue": 4, "output_tokens_per_s": 60, "requests_per_minute": 4,
                           "outages": ("10m+10m",)}},
    "hardware": {"train_when": "charging", "profiles": ("pixel-8", "galaxy-a14", "raspberry-pi-5")},
}  # fmt: skip
"""Everything can go wrong: short spells, slow links, few places, a small rate, an outage in the hour of asking."""


def name(device: int) -> str:
    return f"d{device}"


def timeline(state: dict | None = None, seed: int = 1, **sections) -> Timeline:
    return Timeline(Experiment.model_validate(sections), seed, name, state)


def asks(round: int, devices, size: Size = SIZE, each: int = 1, lane: str = "augment") -> list[Ask]:
    return [Ask(f"{lane}-r{round}-{d}+{part}", d, size, lane) for d in devices for part in range(each)]


def works(round: int, devices, each: int = 1) -> list[Work]:
    return [
        Work(d, arm, 24, 20_000, needs, 12, 10_000)
        for d in devices
        for arm, needs in (
            ("local", ()), ("collaborative", tuple(f"augment-r{round}-{d}+{part}" for part in range(each))),
        )
    ]  # fmt: skip


def run(virtual: Timeline, round: int, devices, size: Size = SIZE, each: int = 1) -> Schedule:
    plan = virtual.plan(round, asks(round, devices, size, each))
    schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, size), works(round, devices, each))
    virtual.advance(schedule)
    return schedule


def trained(schedule: Schedule, arm: str = "collaborative", device: int = 0) -> list[Version]:
    return [version for version in schedule.versions if (version.arm, version.device) == (arm, device)]


# --- the invariants -------------------------------------------------------------------------------------------


def test_the_default_network_is_a_run_without_one():
    """Every request gets through at once, and each adapter is trained once on all there is."""
    virtual = timeline()
    for round in range(3):
        schedule = run(virtual, round, range(20), each=3)
        assert schedule.plan.granted == schedule.received == {ask.request_id for ask in schedule.plan.asks}
        assert {attempt.outcome for attempt in schedule.attempts} == {"ok"} and len(schedule.attempts) == 60
        for device in range(20):
            (local,), (own,) = trained(schedule, "local", device), trained(schedule, device=device)
            assert (local.on, local.outcome, own.on, own.outcome) == ("real", "ok", "samples", "ok")
            assert virtual.answering(schedule, device, "collaborative", 0.0) is own
        assert all(final.failed_s is None for final in schedule.finals.values())


def test_nobody_online_is_a_normal_round_and_equals_local():
    virtual = timeline(network={"availability": 0})
    schedule = run(virtual, 0, range(10))
    assert schedule.plan.granted == schedule.plan.online == frozenset()
    assert {final.outcome for final in schedule.finals.values()} == {"offline"}
    assert traffic(schedule.attempts, math.inf).sent == 0
    for device in range(10):
        (own,) = trained(schedule, device=device)
        assert (own.on, own.outcome) == ("real", "ok")
    assert run(timeline(network={"availability": 0}), 0, []).versions == ()


@given(st.permutations(range(14)), st.integers(0, 5))
@settings(max_examples=8, deadline=None)
def test_the_order_of_devices_changes_nothing(order, seed):
    ordered, shuffled = timeline(seed=seed, **HARD), timeline(seed=seed, **HARD)
    for round in range(2):
        one, other = run(ordered, round, range(14), each=2), run(shuffled, round, order, each=2)
        assert one.finals == other.finals
        assert sorted(one.attempts, key=str) == sorted(other.attempts, key=str)
        assert sorted(one.versions, key=str) == sorted(other.versions, key=str)
    assert ordered._state.bodies == shuffled._state.bodies


@given(st.sets(st.integers(0, 30), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_company_changes_nothing_with_an_unlimited_cloud(some):
    """Nor does another arm: each has its own battery and its own share of the cloud."""
    network, hardware = HARD["network"], HARD["hardware"]
    whole = run(timeline(network=network, hardware=hardware), 0, range(31))
    part = run(timeline(network=network, hardware=hardware), 0, sorted(some))
    assert part.finals == {key: final for key, final in whole.finals.items() if final.device in some}
    assert list(part.versions) == [version for version in whole.versions if version.device in some]


def test_lanes_do_not_meet():
    alone, both = timeline(**HARD), timeline(**HARD)
    own = asks(0, range(20))
    one = alone.plan(0, own)
    other = both.plan(0, [*asks(0, range(20), lane="cloud"), *own])
    assert {key: other.finals[key] for key in one.finals} == one.finals


@pytest.mark.parametrize("seed", range(4))
def test_bytes_are_conserved_and_every_request_ends_once(seed):
    virtual = timeline(seed=seed, **HARD)
    seen: Counter[str] = Counter()
    for round in range(2):
        schedule = run(virtual, round, range(30), each=2)
        assert set(schedule.finals) == {ask.request_id for ask in schedule.plan.asks}
        tries = defaultdict(list)
        for attempt in schedule.attempts:
            tries[attempt.request_id].append(attempt)
            link = virtual.link(attempt.device)
            if attempt.outcome != "offline":
                assert link.is_up(attempt.start_s) and schedule.plan.start_s <= attempt.start_s < schedule.plan.end_s
            if attempt.outcome == "ok":
                assert (attempt.bytes_up, attempt.bytes_down) == (SIZE.bytes_up, SIZE.bytes_down)
                assert link.up_until(attempt.start_s, attempt.end_s) >= attempt.end_s - 1e-6
            if attempt.outcome == "dropped":
                assert not link.is_up(attempt.end_s + 1e-6)
            begun = attempt.start_s + 2 * link.rtt_s
            integral = link.uplink.bits(begun, max(begun, attempt.end_s)) / 8
            assert attempt.bytes_up == pytest.approx(min(SIZE.bytes_up, integral), abs=1e-6)
            assert attempt.bytes_down <= (SIZE.bytes_down if attempt.bytes_up == SIZE.bytes_up else 0)
        for request, several in tries.items():
            final = schedule.finals[request]
            assert [attempt.number for attempt in several] == list(range(final.attempts))
            assert [a.outcome == "ok" for a in several[:-1]] == [False] * (final.attempts - 1)
            assert several[-1].outcome == final.outcome
            assert all(a.end_s <= b.start_s for a, b in zip(several, several[1:], strict=False))
        for at_s in (schedule.plan.start_s + m * 60 for m in (0, 7, 12, 18, 45, 90, 1440, 2000)):
            sums, sent = traffic(schedule.attempts, at_s), [a for a in schedule.attempts if a.start_s <= at_s]
            assert sums.sent == pytest.approx(sum(a.bytes_up + a.bytes_down for a in sent))
            assert sums.sent == pytest.approx(sums.received + sums.wasted + sums.in_flight)
            served = sum(final.outcome == "ok" and final.end_s <= at_s for final in schedule.finals.values())
            assert sums.received == served * (SIZE.bytes_up + SIZE.bytes_down)
        assert sums.in_flight == 0 and sums.wasted > 0
        seen.update(attempt.outcome for attempt in schedule.attempts)
    assert {"ok", "dropped", "rate_limited", "unreachable"} <= set(seen), seen


WORLDS = st.fixed_dictionaries({
    "network": st.fixed_dictionaries({
        "kind": st.sampled_from(["always", "onoff"]), "availability": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "mean_down_s": st.sampled_from([30.0, 600.0, 40_000.0]), "ask_within_h": st.sampled_from([0.0, 0.5, 24.0]),
        "downlink_mbps": st.sampled_from([0.005, 28.8]), "uplink_mbps": st.sampled_from([0.005, 10.0]),
        "outages": st.sampled_from([(), ("5m+10m", "1h+2h:50%")]), "rtt_s": st.sampled_from([0.0, 0.05]),
        "fallback": st.sampled_from(["real_data", "wait", "stale_samples"]),
    }),
    "cloud": st.fixed_dictionaries({"capacity": st.fixed_dictionaries({
        "concurrency": st.integers(0, 3), "queue": st.integers(-1, 3), "requests_per_minute": st.sampled_from([0, 4]),
        "tokens_per_minute": st.sampled_from([0, 5000]), "outages": st.sampled_from([(), ("1m+20m",)]),
        "output_tokens_per_s": st.sampled_from([0, 20, 60]), "retries": st.integers(0, 4),
        "budget": st.sampled_from([0, 0.01]), "price_out": st.just(4.0),
    })}),
    "hardware": st.fixed_dictionaries({
        "train_when": st.sampled_from(["always", "idle", "charging", "battery"]),
        "profiles": st.just(("pixel-8", "galaxy-a14")),
    }),
})  # fmt: skip


@given(WORLDS, st.permutations(range(6)), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_in_any_world_every_request_ends_once_and_no_byte_is_lost(world, order, seed):
    """And the order of the devices changes nothing, and what a resumed timeline goes on with is all it needs."""
    whole, shuffled = timeline(seed=seed, **world), timeline(seed=seed, **world)
    for round in range(2):
        schedule, other = run(whole, round, range(6), each=2), run(shuffled, round, order, each=2)
        assert schedule.finals == other.finals
        assert sorted(schedule.attempts, key=str) == sorted(other.attempts, key=str)
        assert sorted(schedule.versions, key=str) == sorted(other.versions, key=str)
        shuffled = timeline(json.loads(json.dumps(shuffled.state())), seed=seed, **world)
        assert set(schedule.finals) == {ask.request_id for ask in schedule.plan.asks}
        last = {attempt.request_id: attempt for attempt in schedule.attempts}
        tries = Counter(attempt.request_id for attempt in schedule.attempts)
        for request, final in schedule.finals.items():
            assert tries[request] == final.attempts
            assert last[request].outcome == final.outcome
            assert last[request].end_s <= final.end_s  # after it, another try may have been waited for in vain
            assert final.outcome != "ok" or last[request].end_s == final.end_s
        for at_s in (schedule.plan.start_s + 700, schedule.plan.end_s, math.inf):
            sums = traffic(schedule.attempts, at_s)
            assert sums.sent == pytest.approx(sums.received + sums.wasted + sums.in_flight)
        assert sums.received == len(schedule.received) * (SIZE.bytes_up + SIZE.bytes_down) and sums.in_flight == 0
        for device in range(6):
            for arm in ("local", "collaborative"):
                own = trained(schedule, arm, device)
                assert sum(version.on == "samples" for version in own) <= 1 and len(own) <= 2
                assert all(a.live_s <= b.begun_s for a, b in zip(own, own[1:], strict=False) if a.outcome == "ok")


@given(st.sampled_from(["real_data", "wait", "stale_samples"]), st.integers(0, 99), st.sampled_from([0.0, 3.0]))
@settings(max_examples=10, deadline=None)
def test_nothing_in_the_way_changes_nothing(fallback, seed, hours):
    """An always-on link, a cloud without limits and training always allowed: whatever else is set, each adapter is
    trained once, on what it would be trained on without virtual time.
    """
    network = {"fallback": fallback, "ask_within_h": hours}
    virtual = timeline(seed=seed, network=network, hardware={"profiles": ("galaxy-a14", "pixel-8")})
    for round in range(2):
        schedule = run(virtual, round, range(5), each=2)
        assert schedule.received == schedule.plan.granted == {ask.request_id for ask in schedule.plan.asks}
        assert [(v.arm, v.on, v.outcome) for v in schedule.versions] == [
            ("local", "real", "ok"), ("collaborative", "samples", "ok")
        ] * 5  # fmt: skip


def test_planned_sizes_reproduce_the_plan():
    virtual = timeline(seed=3, **HARD)
    plan = virtual.plan(0, asks(0, range(30), each=2))
    schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, SIZE))
    assert schedule.finals == plan.finals and schedule.received == plan.granted
    assert sorted(schedule.attempts, key=str) == sorted(plan.attempts, key=str)
    assert 0 < len(plan.granted) < 60


def test_a_resumed_timeline_goes_on():
    whole, first = timeline(**HARD), timeline(**HARD)
    assert run(whole, 0, range(12)).finals == run(first, 0, range(12)).finals
    state = json.loads(json.dumps(first.state()))
    resumed = timeline(state, **HARD)
    one, other = run(whole, 1, range(12)), run(resumed, 1, range(12))
    assert one.finals == other.finals and one.versions == other.versions and one.attempts == other.attempts


def test_rows_fit_the_table_of_events():
    virtual = timeline(**HARD)
    plan = virtual.plan(0, [*asks(0, range(9)), *asks(0, range(3), lane="cloud")])
    schedule = virtual.schedule(plan, dict.fromkeys(plan.granted, SIZE), works(0, range(9)))
    rows = virtual.event_rows(schedule)
    assert all(set(row) <= set(TABLES["events"].names) for row in rows)
    assert len({row["event_id"] for row in rows}) == len(rows)
    assert {row["kind"] for row in rows} == {"augment", "answer", "train"}
    assert {row["arm"] for row in rows if row["kind"] == "answer"} == {"cloud"}
    assert all(row["duration_s"] >= 0 and row["energy_j"] >= 0 for row in rows)
    assert any(row["energy_j"] > 0 for row in rows if row["kind"] == "augment")


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
    assert first.energy_j == pytest.approx(6.5 * first.load_s) and 19 < first.load_s < 21
    assert virtual.answering(schedule, 0, "collaborative", math.inf).on == "samples"


def test_work_crosses_midnight_and_the_next_waits_for_it():
    virtual = timeline(network=QUICK, hardware={**DAY, "profiles": ("raspberry-pi-4",)})
    plan = virtual.plan(0, [])
    long = Work(0, "local", 2000, 2_000_000)
    schedule = virtual.schedule(plan, {}, [long])
    (first,) = schedule.versions
    assert first.live_s > DAY_S and first.energy_j == pytest.approx(6.5 * first.load_s)
    virtual.advance(schedule)
    (second,) = virtual.schedule(virtual.plan(1, []), {}, [Work(0, "local", 24, 20_000)]).versions
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
