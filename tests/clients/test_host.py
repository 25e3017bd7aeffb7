"""A host loses no device when its worker dies, and finds the one that kills it."""

import json

import pytest

from clients.host import WorkerDied, guarded, run_pass
from sim.errors import ResumableStop, UserError
from sim.experiment import Experiment
from sim.results import RunDirectory


class Flaky:
    """An executor whose worker dies under given devices: always (`poison`), or the first time (`once`)."""

    def __init__(self, poison=(), once=()):
        self.poison, self.once, self.calls = set(poison), set(once), []

    def call(self, method, shard, *arguments, deadline_s):
        self.calls.append(shard.devices)
        if self.poison & set(shard.devices):
            raise WorkerDied("killed by signal 9")
        if self.once & set(shard.devices):
            self.once -= set(shard.devices)
            raise WorkerDied("killed by signal 9")
        n = len(shard.devices)
        columns = {"device": list(shard.devices), "outcome": ["ok"] * n}
        return {"parts": {"metrics": [shard.name]}, "columns": columns, "models": {}}


def _run(tmp_path, executor, devices=range(10), shard=4, strict=False):
    run = RunDirectory.create(tmp_path / "run", Experiment())
    order = {"devices": list(devices), "seed": 1, "round": 0, "samples": []}
    return run_pass(executor, "learn", run, order, shard, 10.0, tmp_path / "progress", strict)


def test_devices_are_handled_in_shards_of_a_bounded_size(tmp_path):
    executor = Flaky()
    result = _run(tmp_path, executor)
    assert executor.calls == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert result["columns"]["device"] == list(range(10))
    assert (tmp_path / "progress").read_text() == "10"


def test_a_worker_that_dies_once_costs_a_retry_and_nothing_else(tmp_path):
    result = _run(tmp_path, Flaky(once={5}))
    assert sorted(result["columns"]["device"]) == list(range(10))
    assert set(result["columns"]["outcome"]) == {"ok"}
    assert [failure["devices"] for failure in result["failures"]] == [[4, 5, 6, 7]]


def test_the_one_guilty_device_is_found_and_marked(tmp_path):
    result = _run(tmp_path, Flaky(poison={6}))
    outcomes = dict(zip(result["columns"]["device"], result["columns"]["outcome"], strict=True))
    assert outcomes == {device: "crashed" if device == 6 else "ok" for device in range(10)}
    assert all("signal 9" in failure["detail"] for failure in result["failures"])


def test_strict_stops_at_the_first_death(tmp_path):
    with pytest.raises(ResumableStop, match="engine.strict"):
        _run(tmp_path, Flaky(once={5}), strict=True)


def test_errors_become_replies():
    def wrong():
        raise UserError("cloud.model: no such model")

    def broken():
        raise ZeroDivisionError("division by zero")

    assert guarded(wrong) == {"error": "UserError", "message": "cloud.model: no such model", "traceback": ""}
    reply = guarded(broken)
    assert reply["error"] == "Failure" and "test_host.py" in reply["traceback"]
    json.dumps(reply)
