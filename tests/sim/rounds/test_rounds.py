"""The glue of round loop and timeline: names and steps as the passes count them, and what hosts are told."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from untether.clients.device.augmentation import questions, sample_orders
from untether.clients.device.device import Device
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.population.source import device_id, open_population
from untether.sim.rounds.day import sizes_of
from untether.sim.rounds.flower_records import order_columns
from untether.sim.rounds.material import Material
from untether.sim.rounds.messages import Order, Samples
from untether.sim.rounds.planner import Rounds
from untether.sim.run.tables import TABLES
from untether.sim.time.asking import Size
from untether.sim.time.timeline_state import REAL, SAMPLES, STALE

MATERIAL = Material(real=6, real_tokens=600, accepted=12, accepted_tokens=1200, received=20, received_tokens=2000)
SIZE = Size(3000, 1500, 700, 300)


def rounds(state=None, /, **sections) -> Rounds:
    experiment = Experiment.model_validate({"population": {"users": 4}, **sections})
    return Rounds(experiment, 1, open_population(experiment, 1), state)


def run(virtual: Rounds, round: int = 0, devices=range(4), material=MATERIAL):
    agenda = virtual.plan(round, devices)
    sizes = {name: SIZE for name in agenda.plan.granted}
    return agenda, virtual.schedule(virtual.deliver(agenda, sizes), dict.fromkeys(agenda.asking, material))


def to_train(virtual: Rounds, day, round: int = 0) -> dict[str, str]:
    """What the learn pass is told to train in this round: `device/arm` and on what."""
    return {f"{row.device}/{row.arm}": row.on for row in learn(virtual, day).versions if row.round == round}


def learn(virtual: Rounds, day):
    """The order of the learn pass."""
    return virtual.learn(day, (), (), {})


def test_requests_are_named_as_the_fetch_pass_names_them():
    experiment = Experiment(population={"users": 4}, cloud={"samples": 20, "samples_per_request": 8})
    virtual = rounds(cloud={"samples": 20, "samples_per_request": 8})
    order = Order(seed=1, round=2)
    named = [ask.request_id for ask in virtual.plan(2, range(4)).plan.asks]
    made = []
    for index in range(4):
        device = Device(index, virtual.population.user(index))
        made += [request.request_id for request in sample_orders(experiment, order, device)]
        made += [request.request_id for request, _ in questions(experiment, order, device)]
    assert named == made and len(named) > 20


def test_by_default_everything_is_asked_and_trained_once():
    virtual = rounds()
    agenda, day = run(virtual)
    told, asked = learn(virtual, day), virtual.fetch(agenda)
    assert agenda.due == asked.due == (0, 1, 2, 3) and asked.held == ()
    names = [f"{device}/{arm}" for device in range(4) for arm in virtual.arms]
    assert to_train(virtual, day) == {name: REAL if name.endswith("/local") else SAMPLES for name in names}
    assert all(row.kept == row.arm for row in told.versions) and told.lost == () and told.settled == -1
    assert told.trains == tuple(Samples(d, 0, 0, SAMPLES) for d in range(4))
    by_arm = {v.arm: v for v in day.schedule.versions if v.device == 0}
    # local: 6 items are 1 step a pass, 6 passes; the others 18 items, 3 a pass; matched: as many steps on 6 items
    assert by_arm["local"].load_s < by_arm["local_matched"].load_s
    assert by_arm["collaborative"].load_s == pytest.approx(by_arm["placebo"].load_s, rel=1e-6)


def test_what_local_costs_does_not_hang_on_samples():
    """Not even on their length: it neither takes longer nor runs out of memory for an example that it never sees."""
    loads = []
    for longest in (128, 4000):
        material = Material(6, 600, 12, 12_000, 20, 20_000, longest=longest, longest_real=128)
        _, day = run(rounds(hardware={"profiles": ("galaxy-a14",)}), material=material)
        loads.append({version.arm: (version.outcome, version.load_s) for version in day.schedule.versions})
    assert loads[0]["local"] == loads[1]["local"] and loads[0]["local_matched"] == loads[1]["local_matched"]
    assert loads[0]["collaborative"] != loads[1]["collaborative"]


def test_what_is_trained_without_a_cloud():
    names = [f"{device}/{arm}" for device in range(4) for arm in rounds().arms]
    virtual = rounds(network={"availability": 0})
    agenda, day = run(virtual)
    assert len(virtual.fetch(agenda).held) == len(agenda.plan.asks)
    assert to_train(virtual, day) == dict.fromkeys(names, REAL)
    virtual = rounds(network={"availability": 0, "fallback": "wait"})
    assert to_train(virtual, run(virtual)[1]) == {name: REAL for name in names if name.endswith("/local")}
    virtual = rounds(hardware={"nominal_model": "Qwen2.5-3B", "profiles": ("galaxy-a14",)})
    assert to_train(virtual, run(virtual)[1]) == {}


def test_a_device_that_trains_twice_keeps_both_while_queries_come():
    late = {"network": {"outages": ("0h+10h",), "ask_within_h": 0.0}}
    at_the_end = rounds(**late)
    _, day = run(at_the_end)
    assert {version.on for version in day.schedule.versions if version.arm == "collaborative"} == {REAL, SAMPLES}
    assert to_train(at_the_end, day)["0/collaborative"] == SAMPLES, "the first of the two would answer nobody"
    by_day = rounds(**late, hardware={"queries": "day"})
    _, day = run(by_day)
    told = [(row.device, row.arm, row.on, row.kept) for row in learn(by_day, day).versions]
    assert (0, "collaborative", REAL, "collaborative.first") in told
    assert (0, "collaborative", SAMPLES, "collaborative") in told


@pytest.mark.parametrize(
    ("drift", "earlier"),
    [
        ({"samples": "refresh"}, []), ({"samples": "keep"}, [0, 1, 2]), ({"samples": "age", "max_age": 1}, []),
        ({"samples": "age", "max_age": 2}, [2]), ({"samples": "age", "max_age": 3}, [1, 2]),
        ({"samples": "age", "max_age": 4}, [0, 1, 2]), ({"samples": "age", "max_age": 9}, [0, 1, 2]),
    ],
)  # fmt: skip
def test_samples_of_earlier_rounds(drift, earlier):
    """`earlier`: what round 3 trains on beside its own; a resumed run says the same."""
    virtual = rounds(drift=drift, rounds=4, arms=("collaborative",))
    for round in range(3):
        virtual.advance(run(virtual, round)[1])
    resumed = json.loads(json.dumps(virtual.state()))
    for each in (virtual, rounds(resumed, drift=drift, rounds=4, arms=("collaborative",))):
        _, day = run(each, 3)
        assert [row[1:] for row in learn(each, day).trains if row.device == 0] == [(min([*earlier, 3]), 3, SAMPLES)]
        items = MATERIAL.real + (1 + len(earlier)) * MATERIAL.accepted
        (version,) = (version for version in day.schedule.versions if version.device == 0)
        (alike, *_) = run(rounds(arms=("collaborative",)), material=Material(items, 100 * items))[1].schedule.versions
        assert version.load_s == pytest.approx(alike.load_s, rel=0.01)


def test_a_sample_is_used_for_max_age_rounds_where_devices_ask_seldom():
    """Every third round: with an age of 3 the last samples are just too old, with one of 4 they are still used."""
    used = {}
    for max_age in (3, 4):
        drift = {"samples": "age", "max_age": max_age, "every": 3}
        virtual = rounds(drift=drift, rounds=7, arms=("collaborative",))
        for round in range(7):
            _, day = run(virtual, round)
            told = learn(virtual, day).trains
            used[max_age, round] = [(row.first, row.last) for row in told if row.device == 0]
            virtual.advance(day)
    assert [used[3, round] for round in (0, 3, 6)] == [[(0, 0)], [(3, 3)], [(6, 6)]]
    assert [used[4, round] for round in (0, 3, 6)] == [[(0, 0)], [(0, 3)], [(3, 6)]]


def test_stale_samples_are_the_last_that_came():
    virtual = rounds(network={"outages": ("48h+24h",), "fallback": "stale_samples"}, rounds=3, arms=("collaborative",))
    for round in range(2):
        virtual.advance(run(virtual, round)[1])
    _, day = run(virtual, 2)
    assert to_train(virtual, day, 2) == {f"{device}/collaborative": STALE for device in range(4)}
    told = set(learn(virtual, day).trains)
    assert told == {(device, 1, 1, STALE) for device in range(4)}


def test_devices_that_are_not_due_neither_ask_nor_train():
    virtual = rounds(drift={"policy": "never", "stagger": 2}, rounds=3, arms=("local", "collaborative"))
    due = []
    for round in range(3):
        agenda, day = run(virtual, round)
        assert {ask.device for ask in agenda.plan.asks} == set(agenda.due)
        assert set(to_train(virtual, day, round)) == {f"{d}/{arm}" for d in agenda.due for arm in virtual.arms}
        due.append(agenda.due)
        virtual.advance(day)
    assert due == [(0, 2), (1, 3), ()]
    assert {(row.device, row.round) for row in learn(virtual, day).versions} == {
        (device, device % 2) for device in range(4)
    }


def test_sizes_are_summed_over_draws():
    row = {"kind": "augment", "request_id": "a", "bytes_up": 10, "bytes_down": 5, "tokens_in": 3, "tokens_out": None}
    rows = [{**row, "attempt": 1, "outcome": "ok"}, {**row, "attempt": 0, "outcome": "malformed"}]
    assert sizes_of([*rows, {"kind": "worker_died", "attempt": 0}]) == {"a": Size(20, 10, 6, 0, "ok", bodies=2)}


def test_rows_are_those_of_both_worlds():
    virtual = rounds(network={"availability": 0.5, "mean_down_s": 7200})
    _, day = run(virtual)
    answered = sorted(day.schedule.received)[0]
    answers = [
        {"kind": "augment", "request_id": answered, "attempt": 0, "detail": "a-model", "outcome": "ok"},
        {"kind": "worker_died", "request_id": None, "attempt": 0, "detail": "killed", "outcome": "crashed"},
    ]
    learned = [{"kind": "train", "event_id": f"train-s1-r0-{device_id(0)}-local-real", "tokens_in": 77, "steps": 6,
                "outcome": "ok", "detail": "6 steps"}]  # fmt: skip
    found = list(virtual.event_rows(day, answers, learned))
    assert all(set(row) <= set(TABLES["events"].names) for row in found)
    assert [row["detail"] for row in found if row["kind"] == "worker_died"] == ["killed"]
    (one,) = [row for row in found if row.get("request_id") == answered and row["outcome"] == "ok"]
    assert "a-model" in one["detail"]
    trained = [row for row in found if row["kind"] == "train"]
    assert len(trained) == len(day.schedule.versions)
    assert [row["detail"] for row in trained if row.get("tokens_in") == 77] == ["on real, 6 steps"]


def test_a_resumed_seed_goes_on():
    sections = {"drift": {"policy": "on_drift", "samples": "keep"}, "rounds": 3, "network": {"availability": 0.5}}
    virtual = rounds(**sections)
    _, day = run(virtual)
    virtual.advance(day, {SAMPLES: {0: [0.0] * 40 + [1.0] * 60}})
    again = Rounds(virtual.experiment, 1, virtual.population, json.loads(json.dumps(virtual.state())))
    agenda, day = run(again, 1)
    assert 0 in agenda.due and agenda == run(virtual, 1)[0]
    assert day.schedule.versions == run(virtual, 1)[1].schedule.versions
    assert learn(again, day) == learn(virtual, run(virtual, 1)[1])


POLICIES = {
    "every": {"every": 2}, "never": {}, "when_online": {}, "budget": {"tokens": 60_000},
    "on_drift": {"false_alarms": 0.5},
}  # fmt: skip
WRONG = {SAMPLES: {device: [0.0] * 8 + [1.0] * 12 for device in range(4)}, REAL: {0: [0.0] * 8 + [1.0] * 12}}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("few", "more"),
    [
        (("local",), ("local", "collaborative", "placebo", "cloud")),
        (("collaborative",), ("frozen", "local", "synthetic_only", "collaborative", "rag_adapter", "cloud")),
    ],
)
def test_adding_an_arm_changes_no_other(policy, few, more):
    """Not when it is due, trained and live, whatever the links and the cloud do to the others."""
    sections = {
        "drift": {"policy": policy, **POLICIES[policy]}, "rounds": 6,
        "network": {"availability": 0.3, "mean_down_s": 40_000, "ask_within_h": 1.0},
        "cloud": {"timeout_s": 60, "capacity": {"concurrency": 1, "output_tokens_per_s": 20, "retries": 0}},
    }  # fmt: skip
    made = []
    for arms in (few, more):
        virtual, versions = rounds(arms=arms, **sections), []
        for round in range(6):
            _, day = run(virtual, round)
            versions += [version for version in day.schedule.versions if version.arm in few]
            virtual.advance(day, {on: found for on, found in WRONG.items() if virtual.learning[on]})
        made.append(sorted(versions, key=str))
    assert made[0] == made[1] and len(made[0]) >= 4
    if few == ("local",):
        assert {version.on for version in made[0]} == {REAL}


def test_drift_is_watched_in_an_arm_that_is_always_there():
    rounds(drift={"policy": "on_drift"}, arms=("local",))
    rounds(drift={"policy": "on_drift"}, arms=("rag_adapter", "synthetic_only"))
    with pytest.raises(UserError, match=r"on_drift.*collaborative, which is not among arms = \['synthetic_only'\]"):
        rounds(drift={"policy": "on_drift"}, arms=("synthetic_only",))


@pytest.mark.parametrize("kept", ["refresh", "keep", "age"])
def test_what_a_round_leaves_and_is_told_does_not_grow(kept):
    """Though answers are lost in every round."""
    virtual = rounds(
        drift={"samples": kept, "max_age": 3}, rounds=40, arms=("placebo", "collaborative", "cloud"),
        cloud={"timeout_s": 30, "capacity": {"concurrency": 1, "output_tokens_per_s": 20, "retries": 0}},
        network={"ask_within_h": 0.02, "fallback": "stale_samples"},
    )  # fmt: skip
    sizes, lost = [], 0
    for round in range(40):
        agenda = virtual.plan(round, range(4))
        delivered = virtual.deliver(agenda, {name: Size(9000, 4000, 1000, 480) for name in agenda.plan.granted})
        lost += sum(map(len, delivered.lost.values()))
        day = virtual.schedule(delivered, dict.fromkeys(agenda.asking, MATERIAL))
        told = len(json.dumps(order_columns(learn(virtual, day))))
        virtual.advance(day)
        sizes.append(told + len(json.dumps(virtual.state())))
    assert lost > 3 and max(sizes[30:]) < 1.15 * max(sizes[5:15])


def test_local_matched_takes_the_steps_of_collaborative_and_none_of_its_own():
    """The schedule as the trainer (tests/test_columns.py has that one's)."""
    virtual = rounds(by_arm={"collaborative": {"training": {"steps": 7}}}, arms=("local_matched", "collaborative"))
    work = {arm: virtual._work(0, 0, arm, MATERIAL, ()) for arm in virtual.arms}
    assert work["local_matched"].steps == work["collaborative"].steps == 7
    with pytest.raises(ValidationError, match="takes as many steps as collaborative"):
        rounds(by_arm={"local_matched": {"training": {"steps": 7}}})
