"""The glue of round loop and timeline: names and steps as the passes count them, and what hosts are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.arms import TRAINED
from clients.device import Device, Shard
from clients.fetch import _orders, _questions
from clients.jobs import TrainSettings
from sim.asking import Size
from sim.experiment import Experiment
from sim.population.source import device_id, open_population
from sim.results import TABLES
from sim.rounds import LEARNS_FROM, Material, Rounds, optimizer_steps, sizes_of
from sim.sections import Training

MATERIAL = Material(real=6, real_tokens=600, accepted=12, accepted_tokens=1200, received=20, received_tokens=2000)
SIZE = Size(3000, 1500, 700, 300)


def rounds(**sections) -> Rounds:
    experiment = Experiment.model_validate({"population": {"users": 4}, **sections})
    return Rounds(experiment, 1, open_population(experiment, 1))


def run(virtual: Rounds, round: int = 0, devices=range(4)):
    plan = virtual.plan(round, devices)
    sizes = {ask.request_id: SIZE for ask in plan.asks if ask.request_id not in virtual.ungranted(plan)}
    schedule = virtual.schedule(plan, sizes, dict.fromkeys(devices, MATERIAL))
    return plan, schedule


def test_requests_are_named_as_the_fetch_pass_names_them():
    experiment = Experiment(population={"users": 4}, cloud={"samples": 20, "samples_per_request": 8})
    virtual = rounds(cloud={"samples": 20, "samples_per_request": 8})
    worker, shard = SimpleNamespace(experiment=experiment), Shard(1, 2, tuple(range(4)))
    named = [ask.request_id for ask in virtual.plan(2, range(4)).asks]
    made = []
    for index in range(4):
        device = Device(index, virtual.population.user(index))
        made += [request.request_id for request in _orders(worker, shard, device)]
        made += [request.request_id for request, _ in _questions(worker, shard, device)]
    assert named == made and len(named) > 20


def test_arms_and_steps_are_those_of_the_passes():
    assert tuple(LEARNS_FROM) == TRAINED


@given(st.integers(1, 200), st.floats(0.1, 20), st.integers(0, 50), st.integers(1, 32))
def test_steps_are_counted_as_the_engine_counts_them(items, epochs, steps, batch):
    training = Training(epochs=epochs, steps=steps, batch_size=batch)
    assert optimizer_steps(training, items) == TrainSettings.of(training).total_steps(items)
    assert optimizer_steps(training, 0) == 0


def test_by_default_there_is_nothing_to_tell():
    virtual = rounds()
    plan, schedule = run(virtual)
    assert virtual.ungranted(plan) == []
    assert virtual.learning(schedule) == {"lost": [], "untrained": [], "stale": [], "twice": []}
    by_arm = {v.arm: v for v in schedule.versions if v.device == 0}
    assert set(by_arm) == set(virtual.arms)
    # local: 6 items are 1 step a pass, 6 passes; the others 18 items, 3 a pass; matched: as many steps on 6 items
    assert by_arm["local"].load_s < by_arm["local_matched"].load_s
    assert by_arm["collaborative"].load_s == pytest.approx(by_arm["placebo"].load_s, rel=1e-6)


def test_what_is_told_without_a_cloud():
    names = [f"{device}/{arm}" for device in range(4) for arm in rounds().arms]
    virtual = rounds(network={"availability": 0})
    plan, schedule = run(virtual)
    assert len(virtual.ungranted(plan)) == len(plan.asks)
    assert virtual.learning(schedule)["untrained"] == []
    virtual = rounds(network={"availability": 0, "fallback": "wait"})
    told = virtual.learning(run(virtual)[1])
    assert set(told["untrained"]) == {name for name in names if not name.endswith("/local")}
    virtual = rounds(network={"outages": ("0h+10h",), "ask_within_h": 0.0})
    told = virtual.learning(run(virtual)[1])
    assert set(told["twice"]) == {name for name in names if not name.endswith("/local")}
    virtual = rounds(hardware={"nominal_model": "Qwen2.5-3B", "profiles": ("galaxy-a14",)})
    assert set(virtual.learning(run(virtual)[1])["untrained"]) == set(names)


def test_sizes_are_summed_over_draws():
    row = {"kind": "augment", "request_id": "a", "bytes_up": 10, "bytes_down": 5, "tokens_in": 3, "tokens_out": None}
    rows = [{**row, "attempt": 1, "outcome": "ok"}, {**row, "attempt": 0, "outcome": "malformed"}]
    assert sizes_of([*rows, {"kind": "worker_died", "attempt": 0}]) == {"a": Size(20, 10, 6, 0, "ok")}


def test_rows_are_those_of_both_worlds():
    virtual = rounds(network={"availability": 0.5, "mean_down_s": 7200})
    plan, schedule = run(virtual)
    answered = sorted(schedule.received)[0]
    answers = [
        {"kind": "augment", "request_id": answered, "attempt": 0, "detail": "a-model", "outcome": "ok"},
        {"kind": "worker_died", "request_id": None, "attempt": 0, "detail": "killed", "outcome": "crashed"},
    ]
    learned = [{"kind": "train", "device_id": device_id(0), "arm": "local", "tokens_in": 77, "outcome": "ok",
                "detail": "6 steps"}]  # fmt: skip
    rows = virtual.event_rows(schedule, answers, learned)
    assert all(set(row) <= set(TABLES["events"].names) for row in rows)
    assert [row["detail"] for row in rows if row["kind"] == "worker_died"] == ["killed"]
    (one,) = [row for row in rows if row.get("request_id") == answered and row["outcome"] == "ok"]
    assert "a-model" in one["detail"]
    trained = [row for row in rows if row["kind"] == "train"]
    assert len(trained) == len(schedule.versions)
    assert [row["detail"] for row in trained if row.get("tokens_in") == 77] == ["on real, 6 steps"]


def test_a_resumed_seed_goes_on():
    virtual = rounds()
    _, schedule = run(virtual)
    virtual.advance(schedule)
    again = Rounds(virtual.experiment, 1, virtual.population, virtual.state())
    assert run(again, 1)[1].versions == run(virtual, 1)[1].versions
