"""The cloud in closed form against a simulation of it, event by event, in SimPy."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.sim.experiment.virtual_sections import CloudCapacity
from untether.sim.time.cloud_capacity import VirtualCloud, outages, price
from untether.sim.time.network.spells import up_until

PER_S = 50.0
"""Tokens a place writes a second."""

Asked = tuple[float, int, float]
"""A request: when it arrives, the tokens it wants, how long it stays."""


def simulated(capacity: CloudCapacity, asked: list[Asked]) -> list[tuple[str, float]]:
    """What becomes of each request (arriving in this order), and when: (outcome, time)."""
    env, found = simpy.Environment(), {}
    places, is_open = simpy.Resource(env, capacity.concurrency), outages(capacity)

    def request(number: int, arrives_s: float, tokens: int, stays_s: float) -> Iterator[simpy.Event]:
        yield env.timeout(arrives_s)
        limit_s = arrives_s + stays_s
        if not is_open.at(env.now)[0]:
            found[number] = ("unreachable", env.now)
            return
        if places.count == places.capacity and len(places.queue) >= capacity.queue >= 0:
            found[number] = ("queue full", env.now)
            return
        with places.request() as place:
            yield place | env.timeout(stays_s)
            if not place.triggered:
                found[number] = ("gone", env.now)
                return
            done_s = env.now + tokens / PER_S
            end_s = min(done_s, limit_s, up_until(is_open, env.now, min(done_s, limit_s)))
            yield env.timeout(end_s - env.now)
            cut = "gone" if end_s == limit_s else "server_error"
            found[number] = ("ok" if end_s == done_s else cut, env.now)

    for number, each in enumerate(asked):
        env.process(request(number, *each))
    env.run()
    return [found[number] for number in range(len(asked))]


def in_closed_form(capacity: CloudCapacity, asked: list[Asked], cut: int | None = None) -> list[tuple[str, float]]:
    """The same, one arrival after another; carried over to another cloud after `cut` of them."""
    cloud, found = VirtualCloud(capacity), []
    for number, (arrives_s, tokens, stays_s) in enumerate(asked):
        if number == cut:
            cloud = VirtualCloud(capacity, json.loads(json.dumps(cloud.state_at(arrives_s))))
        verdict = cloud.admit(arrives_s, tokens)
        if verdict.outcome != "ok":
            found.append((verdict.detail if verdict.detail == "queue full" else verdict.outcome, arrives_s))
            continue
        served = cloud.serve(arrives_s, arrives_s + stays_s, 0, tokens)
        assert served.queued_s <= stays_s + 1e-9 and (served.begun or served.outcome == "gone")
        found.append((served.outcome, served.end_s))
    return found


def traffic(seed: int, number: int) -> list[Asked]:
    """Requests about every 4 s, of 2 to 20 s, with 5 to 60 s of patience."""
    rng, now_s, asked = random.Random(seed), 0.0, []
    for _ in range(number):
        now_s += rng.expovariate(0.25)
        asked.append((now_s, rng.randint(100, 1000), rng.uniform(5, 60)))
    return asked


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([-1, 0, 2, 8]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_request_ends_as_in_a_simulation(seed, concurrency, queue, closed):
    capacity = CloudCapacity(
        concurrency=concurrency, queue=queue, output_tokens_per_s=PER_S, outages=("1m+30s",) if closed else ()
    )
    asked = traffic(seed, 60)
    expected = simulated(capacity, asked)
    for found in (in_closed_form(capacity, asked), in_closed_form(capacity, asked, cut=30)):
        assert [outcome for outcome, _ in found] == [outcome for outcome, _ in expected]
        assert [time for _, time in found] == pytest.approx([time for _, time in expected])


def test_the_traffic_meets_everything_that_can_happen():
    """So that the comparison above says something."""
    capacity = CloudCapacity(concurrency=2, queue=4, output_tokens_per_s=PER_S, outages=("1m+30s",))
    seen = {outcome for seed in range(5) for outcome, _ in simulated(capacity, traffic(seed, 60))}
    assert seen == {"ok", "gone", "server_error", "unreachable", "queue full"}


def test_a_queue_of_two_by_hand():
    """One place, 10 s each, patience 25 s: the third would have to wait 20 s, the fourth 30 s."""
    cloud = VirtualCloud(CloudCapacity(concurrency=1, queue=3, output_tokens_per_s=PER_S))
    served = [cloud.serve(0.0, 25.0, 0, 500) for _ in range(4)]
    assert [(each.outcome, each.end_s, each.queued_s) for each in served] == [
        ("ok", 10.0, 0.0), ("ok", 20.0, 10.0), ("gone", 25.0, 20.0), ("gone", 25.0, 25.0),
    ]  # fmt: skip
    assert [each.begun for each in served] == [True, True, True, False]
    assert [cloud.waiting(now) for now in (0.0, 10.0, 20.0, 25.0)] == [3, 2, 1, 0]
    assert cloud.state_at(22.0) == {"places": [25.0], "queue": []}


def test_price():
    capacity = CloudCapacity(price_in=2.0, price_out=4.0)
    assert price(capacity, 1_000_000, 500_000) == 4.0
