"""What holds for every timeline: bytes are kept, requests end once, company and order change nothing."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.timelines import HARD, SIZE, asks, run, timeline, trained, works
from untether.sim.run.tables import TABLES
from untether.sim.time.asking import traffic
from untether.sim.time.timeline import Schedule, Timeline
from untether.sim.time.wall import WallTimeline


def assert_alike(one: Schedule, other: Schedule) -> None:
    """The same schedule, whatever the order of its rows."""
    assert one.finals == other.finals
    assert sorted(one.attempts, key=str) == sorted(other.attempts, key=str)
    assert sorted(one.versions, key=str) == sorted(other.versions, key=str)


def test_the_default_network_is_a_run_without_one():
    """Every request gets through at once, and each adapter is trained once on all there is."""
    virtual = timeline()
    for round in range(3):
        schedule = run(virtual, round, range(20), each=3)
        assert schedule.received == {ask.request_id for ask in schedule.plan.asks}
        assert {attempt.outcome for attempt in schedule.attempts} == {"ok"} and len(schedule.attempts) == 60
        for device in range(20):
            (local,), (own,) = trained(schedule, "local", device), trained(schedule, device=device)
            assert (local.on, local.outcome, own.on, own.outcome) == ("real", "ok", "samples", "ok")
            assert virtual.answering(schedule, device, "collaborative", 0.0) is own
        assert all(final.failed_s is None for final in schedule.finals.values())


def test_nobody_online_is_a_normal_round_and_equals_local():
    virtual = timeline(network={"availability": 0})
    schedule = run(virtual, 0, range(10))
    assert schedule.received == frozenset()
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
        assert_alike(one, other)
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
        assert_alike(schedule, other)
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
        assert schedule.received == {ask.request_id for ask in schedule.plan.asks}
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
    rows = list(virtual.event_rows(schedule))
    assert all(set(row) <= set(TABLES["events"].names) for row in rows)
    assert len({row["event_id"] for row in rows}) == len(rows)
    assert {row["kind"] for row in rows} == {"augment", "answer", "train"}
    assert {row["arm"] for row in rows if row["kind"] == "answer"} == {"cloud"}
    assert all(row["duration_s"] >= 0 and row["energy_j"] >= 0 for row in rows)
    assert any(row["energy_j"] > 0 for row in rows if row["kind"] == "augment")


def test_links_and_habits_that_are_drawn_again_are_the_same(monkeypatch):
    """A fleet that is larger than what is kept of it, over several days."""
    kept = timeline(**HARD)
    for name, most in (("DRAWN", 11), ("PASSING", 3)):
        monkeypatch.setattr(f"untether.sim.time.network.links.{name}", most)
    again = timeline(**HARD)
    for round in range(3):
        assert_alike(run(again, round, range(12), each=2), run(kept, round, range(12), each=2))
        assert len(again.links._links) <= 3 < len(kept.links._links)


def test_who_does_not_answer_trains_the_same_and_its_adapters_are_forgotten():
    """Their versions are told, and how warm they are now; after the last round nobody asks that either."""
    virtual = timeline(**HARD)
    plan = virtual.plan(0, asks(0, range(6)))
    delivery = virtual.deliver(plan, dict.fromkeys(plan.granted, SIZE))
    whole, some, end = (
        virtual.train(delivery, works(0, range(6)), answering, last)
        for answering, last in ((None, False), ({1, 4}, False), ({1, 4}, True))
    )
    assert end.versions == some.versions == whole.versions and end.finals == some.finals == whole.finals
    answer = {key: found for key, found in whole.state.live.items() if key[0] in {1, 4}}
    assert end.state.live == some.state.live == answer != whole.state.live
    assert some.state.bodies == whole.state.bodies and whole.state.bodies and not end.state.bodies


def test_deployed_devices_have_the_same_timeline_to_call():
    """Its rounds are the same loop's; a run of them on real nodes is in tests/test_deployment.py."""
    own = [name for name, thing in vars(WallTimeline).items() if callable(thing) and not name.startswith("__")]
    assert {"plan", "deliver", "carry"} <= set(own)
    for name in own:
        if hasattr(Timeline, name):
            told, mine = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (Timeline, WallTimeline))
            assert told == mine, name
