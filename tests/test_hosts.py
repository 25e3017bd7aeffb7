"""Hosts below, at and above the workers that a machine has room for, on the real runtime: all of them run, alike."""

import pytest
from fleet import answers, losses, make_post, run_in_process, tiny, verdicts
from pandas.testing import assert_frame_equal
from survival import Untether
from test_determinism import FINITE

import untether.clients.hosting.executors
from untether.clients.device.worker import Endpoint, Inputs
from untether.clients.hosting.executors import RayExecutor
from untether.clients.hosting.process import WorkerProcess
from untether.server.background import start_background
from untether.sim.core.errors import ResumableStop
from untether.sim.launch.cluster import start_here
from untether.sim.rounds.messages import Share
from untether.sim.run.directory import RunDirectory


@pytest.mark.timeout(600)
def test_more_hosts_than_workers_learn_the_same(tmp_path):
    """Though answers are lost, so that every kind of message is sent. (As many hosts as workers, or fewer, is what the
    other real runs of the tests have.)
    """
    experiment = tiny(engine__workers=2, engine__hosts=3, engine__deadline_s=120, **{**FINITE, "rounds": 1})
    (tmp_path / "three.toml").write_text(experiment.to_toml())
    with Untether(str(tmp_path / "three.toml"), "--out", str(tmp_path / "three")) as started:
        code, printed = started.end()
    assert code == 0, printed
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        one, three = run_in_process(tmp_path / "one", experiment, endpoint), RunDirectory.open(tmp_path / "three")
    assert (verdicts(one)["verdict"] == "not_received").any()
    assert_frame_equal(verdicts(three), verdicts(one), check_exact=False, atol=5e-3, rtol=0)
    assert_frame_equal(answers(three), answers(one))
    assert_frame_equal(losses(three), losses(one), check_exact=False, atol=1e-4, rtol=0)


def test_a_worker_that_no_node_takes_says_so(tmp_path, monkeypatch):
    """All that is offered is taken, by an actor that does not go away."""
    import ray

    monkeypatch.setattr(untether.clients.hosting.executors, "PLACED_S", 4.0)
    start_here(2, 0, 1)
    try:
        run = RunDirectory.create(tmp_path / "run", tiny())
        holder = ray.remote(WorkerProcess).options(num_cpus=0, resources={"worker": 1}).remote()
        ray.get(holder.pid.remote())
        executor = RayExecutor("worker-of-nobody", make_post(run))
        with pytest.raises(ResumableStop, match=r"worker 0 was placed on no node .* 1 of the resource `worker`"):
            executor.call(Share(seed=1, round=0), Inputs(), deadline_s=60.0)
    finally:
        ray.shutdown()
