"""A machine's speed is measured as a run will use the machine, kept, and read again."""

import json
import subprocess
from dataclasses import asdict, replace

import pytest

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.launch import speed
from untether.sim.launch.estimate import estimate, guess_of
from untether.sim.launch.resources import Resources
from untether.sim.launch.speed import Speed

FOUND = Speed(token_s=0.25)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What the processes that measure are told; each finds `FOUND`, the second one twice the time a token."""
    told = []

    def run(command, input, **_):
        told.append(json.loads(input))
        found = replace(FOUND, token_s=0.25 * len(told))
        return subprocess.CompletedProcess(command, 0, f"loading ...\n{json.dumps(asdict(found))}\n", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("untether.sim.core.limits.cores", lambda: 8)
    monkeypatch.setattr("untether.sim.launch.resources._gpus", lambda: 0)
    monkeypatch.setattr(speed.subprocess, "run", run)
    return told


def experiment(**engine) -> Experiment:
    return Experiment.build({"engine": engine}, None, "it")


@pytest.mark.parametrize(
    ("engine", "gpus", "processes", "threads"),
    [({"workers": 1}, 0, 1, 8), ({"workers": 2}, 0, 2, 4), ({}, 0, 4, 1), ({}, 1, 1, 8), ({"device": "cpu"}, 1, 4, 1)],
)
def test_as_many_processes_measure_as_will_work(measured, monkeypatch, engine, gpus, processes, threads):
    """Four at most; one a GPU, which others beside it would slow down."""
    monkeypatch.setattr("untether.sim.launch.resources._gpus", lambda: gpus)
    speed.measure(experiment(**engine))
    assert len(measured) == processes and {told["threads"] for told in measured} == {threads}
    layout = Resources.of(experiment(**engine), 12)
    assert (min(4, layout.workers), layout.threads) == (processes, threads)


def test_the_mean_is_kept_for_the_same_models_and_workers(measured):
    two = experiment(workers=2)
    assert speed.measure(two) == replace(FOUND, token_s=(0.25 + 0.5) / 2) == speed.kept(two) == speed.speed_of(two)
    assert speed.kept(experiment(workers=1)) is None
    assert speed.kept(Experiment.build({"engine": {"workers": 2}, "lora": {"rank": 4}}, None, "it")) is None


def test_models_that_do_not_load_are_the_users_mistake(measured, monkeypatch):
    said = subprocess.CompletedProcess([], 2, "", "a warning\nerror: no such folder\n")
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(UserError, match="could not be measured: no such folder"):
        speed.measure(experiment())
    assert speed.kept(experiment()) is None


def test_no_cloud_is_a_measure_of_this_machine():
    """More workers make a language model no faster, but the embedded world. Of that one's requests, answered in a tenth
    of the time, a run of nine minutes was once said to be over in two.
    """
    model = {"cloud.provider": "llama_cpp", "cloud.model": "qwen2.5-coder-1.5b"}
    step, cost = ("fetch", "requests"), Speed(request_s=30.0)
    theirs, own = (guess_of(Experiment.read(None, fields), {step: 8.0}, cost, 2) for fields in (model, {}))
    assert theirs.elsewhere == own.elsewhere == {step}
    assert theirs.cost_s[step] == 30.0 and own.cost_s[step] == 15.0


def test_devices_that_do_not_learn_cost_memory_and_a_plan_and_no_work():
    """Requests, tokens and answers are those of the learners; a day of the fleet is said where it takes gigabytes."""
    fields = {"population.tasks": "LaMP_3", "arms": "local,collaborative"}
    few = estimate(Experiment.read(None, {**fields, "population.users": "10"}), Speed())
    large = estimate(Experiment.read(None, {**fields, "population.users": "1000000", "engine.learners": "10"}), Speed())
    real = [step for step in few.work if step[1] != "devices"]
    assert [large.work[step] for step in real] == pytest.approx([few.work[step] for step in real], rel=0.3)
    assert large.work["plan", "devices"] == 1e6 and few.work["plan", "devices"] == 10
    assert large.day_bytes == pytest.approx(1e5 * few.day_bytes, rel=0.3)
    assert "of memory for the fleet" in large.sentence() and "memory" not in few.sentence()
    assert "memory" in dict(large.lines()) and "memory" not in dict(few.lines())
