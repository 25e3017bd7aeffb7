"""A host loses no device when its worker dies, and finds the one that kills it."""

import errno
import json

import pandas as pd
import pytest

from untether.clients.device.worker import Outcome
from untether.clients.hosting.executors import WorkerDied, memory_ran_out
from untether.clients.hosting.host import guarded, run_order
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.population.source import open_population
from untether.sim.rounds.flower_records import reply_from, to_records
from untether.sim.rounds.material import Material
from untether.sim.rounds.messages import ORDERS, Reply, complete, joined, materials, outcomes
from untether.sim.run.directory import RunDirectory

EXPERIMENT = Experiment.read(None, {"arms": "majority,local,cloud", "population.tasks": "LaMP_2,LaMP_4"})


class Flaky:
    """An executor whose worker dies under given devices: always (`poison`), or the first time (`once`)."""

    def __init__(self, poison=(), once=(), outcome="crashed", with_node=0, pressed=False):
        self.poison, self.once, self.calls, self.outcome = set(poison), set(once), [], outcome
        self.with_node, self.lost_nodes, self.pressed = with_node, 0, pressed

    def call(self, shard, inputs, *, deadline_s, progress):
        self.calls.append(shard.devices)
        if self.lost_nodes < self.with_node:
            self.lost_nodes += 1
            raise WorkerDied("its node has died", with_node=True)
        if self.poison & set(shard.devices):
            raise WorkerDied("killed by signal 9", self.outcome, pressed=self.pressed)
        if self.once & set(shard.devices):
            self.once -= set(shard.devices)
            raise WorkerDied("killed by signal 9")
        columns = {"device": list(shard.devices), "outcome": ["ok"] * len(shard.devices)}
        return Outcome(Reply(columns), {"metrics": []})


def _run(tmp_path, executor, devices=range(10), shard=4, strict=False, work="learn"):
    path, engine = tmp_path / "run", EXPERIMENT.engine.model_copy(update={"shard": shard, "strict": strict})
    experiment = EXPERIMENT.model_copy(update={"engine": engine})
    run = RunDirectory.open(path) if path.exists() else RunDirectory.create(path, experiment)
    run.take_over(experiment)
    order = ORDERS[work](seed=1, round=0, devices=tuple(devices))
    return run_order(executor, run, order, tmp_path / "progress")


def _parts(tmp_path, reply, table):
    return RunDirectory.open(tmp_path / "run").parts(1, 0, reply.parts)[table]


def test_devices_are_handled_in_shards_of_a_bounded_size(tmp_path):
    executor = Flaky()
    result = _run(tmp_path, executor)
    assert executor.calls == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert result.columns["device"] == list(range(10))
    assert json.loads((tmp_path / "progress").read_text()) == {"devices": 10}


def test_a_worker_that_dies_once_costs_a_retry_and_nothing_else(tmp_path):
    result = _run(tmp_path, Flaky(once={5}))
    assert sorted(result.columns["device"]) == list(range(10))
    assert set(result.columns["outcome"]) == {"ok"}
    assert [failure["devices"] for failure in result.failures] == [[4, 5, 6, 7]]


def test_the_one_guilty_device_is_found_and_marked(tmp_path):
    result = _run(tmp_path, Flaky(poison={6}))
    assert outcomes(result) == {device: "crashed" if device == 6 else "ok" for device in range(10)}
    complete(range(10), result)
    assert result.lost == {6: "crashed"} and result.counts() == {"outcome.crashed": 1, "outcome.ok": 9}
    assert all("signal 9" in failure["detail"] for failure in result.failures)


def test_finding_the_guilty_one_of_64_costs_nine_deaths(tmp_path):
    executor = Flaky(poison={47})
    result = _run(tmp_path, executor, devices=range(64), shard=256)
    assert sorted(outcomes(result)) == list(range(64)) and result.lost == {47: "crashed"}
    assert len(result.failures) == 9, "twice whole, then 32, 16, ..., 2, and the one device twice"


@pytest.mark.parametrize("outcome", ["crashed", "out_of_memory"])
def test_what_a_lost_device_owed_stands_in_the_tables(tmp_path, outcome):
    """Every arm has a row for every query, so that comparisons stay paired; the answer is empty and scored as such."""
    results = {name: _run(tmp_path, Flaky(poison={6}, outcome=outcome), work=name) for name in ("fetch", "learn")}
    assert "predictions" not in results["fetch"].parts, "answers are recorded by the learn pass"
    run = RunDirectory.open(tmp_path / "run")
    device = open_population(EXPERIMENT, 1).user(6)
    for name, arms in (("learn", {"cloud": 20, "majority": 10, "local": 20}),):
        rows = run.read_parts(_parts(tmp_path, results[name], "predictions"))
        assert rows.groupby("arm").size().to_dict() == arms
        assert set(rows["device_id"]) == {"d00006"} and set(rows["user_id"]) == {device.user_id}
        assert set(rows["outcome"]) == {outcome} and set(rows["prediction"]) == {""} and (rows["score"] == 0).all()
        measured = run.read_parts(part for part in _parts(tmp_path, results[name], "metrics") if "host" in part)
        assert set(measured["arm"]) == set(arms) and (measured["value"] == 0).all()


def test_want_of_memory_on_the_machine_is_no_devices_fault(tmp_path):
    """Fewer devices need less; where one alone has no room, its answers would tell of the machine."""
    executor = Flaky(poison={6}, outcome="out_of_memory", pressed=True)
    with pytest.raises(ResumableStop, match="memory ran out on this machine.*engine.workers; then resume"):
        _run(tmp_path, executor)
    assert executor.calls[-2:] == [(6,), (6,)]
    assert _run(tmp_path, Flaky()).columns["outcome"] == ["ok"] * 10


def test_want_of_memory_for_an_order_without_devices_stops_the_run(tmp_path):
    class Pressed:
        def call(self, *_, **__):
            raise WorkerDied("ended", "out_of_memory", pressed=True)

    with pytest.raises(ResumableStop, match="memory ran out"):
        _run(tmp_path, Pressed(), devices=(), work="share")


def test_a_lost_node_is_no_devices_fault(tmp_path):
    executor = Flaky(with_node=3)
    result = _run(tmp_path, executor, devices=range(2), shard=1)
    assert executor.calls == [(0,)] * 4 + [(1,)]
    assert result.columns["outcome"] == ["ok", "ok"] and len(result.failures) == 3


def test_a_device_that_takes_every_node_with_it_is_found(tmp_path):
    executor = Flaky(with_node=100)
    result = _run(tmp_path, executor, devices=range(1), shard=1)
    assert result.lost == {0: "crashed"} and len(executor.calls) < 10


def test_what_others_counted_is_not_taken_for_a_lost_devices():
    """Columns are lists: a device that has no counts must not stand between those that have."""
    counts = {"real": 3, "real_tokens": 30, "longest": 9, "longest_real": 9}
    columns = {name: [0] for name in ("accepted", "accepted_tokens", "received", "received_tokens")}
    of_one = Reply({"device": [1], "outcome": ["ok"], **columns, **{name: [n] for name, n in counts.items()}})
    both = joined([Reply(lost={0: "crashed"}), of_one])
    assert materials(both) == {1: Material(**counts)}
    again = reply_from(to_records(both))
    assert materials(again) == materials(both) and outcomes(again) == {0: "crashed", 1: "ok"}


def test_every_death_is_an_event(tmp_path):
    result = _run(tmp_path, Flaky(once={5}, poison={9}))
    events = pd.DataFrame(result.events)
    assert set(events["kind"]) == {"worker_died"} and set(events["outcome"]) == {"crashed"}
    assert len(events) == len(result.failures) == events["event_id"].nunique()
    assert events["detail"][0] == "learn of d00004 to d00007 (4 devices): killed by signal 9"
    assert events["device_id"].dropna().unique().tolist() == ["d00009"]


def test_a_finished_shard_is_not_run_again(tmp_path):
    with pytest.raises(ResumableStop):
        _run(tmp_path, Flaky(poison={9}), strict=True)
    executor = Flaky()
    result = _run(tmp_path, executor)
    assert executor.calls == [(8, 9)]
    assert result.columns["device"] == list(range(10))
    assert result.parts["metrics"] == [
        "learn-d00000-d00003-4", "learn-d00004-d00007-4", "learn-d00008-d00009-2",
    ]  # fmt: skip


def test_a_shard_whose_parts_are_gone_is_run_again(tmp_path):
    result = _run(tmp_path, Flaky())
    (tmp_path / "run" / _parts(tmp_path, result, "metrics")[1]).unlink()
    executor = Flaky()
    _run(tmp_path, executor)
    assert executor.calls == [(4, 5, 6, 7)]


def test_strict_stops_at_the_first_death(tmp_path):
    with pytest.raises(ResumableStop, match="engine.strict"):
        _run(tmp_path, Flaky(once={5}), strict=True)


def test_memory_errors_are_told_apart():
    assert memory_ran_out(MemoryError())
    assert memory_ran_out(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not memory_ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory_ran_out(ValueError("out of memory"))


def test_a_full_disk_is_a_resumable_stop():
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert guarded(full)["error"] == "ResumableStop"


def test_errors_become_replies():
    def wrong():
        raise UserError("cloud.model: no such model")

    def broken():
        raise ZeroDivisionError("division by zero")

    assert guarded(wrong) == {"error": "UserError", "message": "cloud.model: no such model", "traceback": ""}
    reply = guarded(broken)
    assert reply["error"] == "Failure" and "test_host.py" in reply["traceback"]
    json.dumps(reply)
