"""A run on a Ray cluster of several nodes (here: on one machine), one of which dies on the way."""

import os
import signal

import psutil
import pytest
from fleet import run_in_process, tiny
from survival import Untether, commits, wait_for
from test_survival import assert_whole

from clients.executors import RayExecutor, WorkerDied
from clients.worker import Endpoint, Post
from server.background import start_background
from sim.cluster import runtime_env, start_here
from sim.errors import ResumableStop
from sim.results import RunDirectory

OBJECTS = 100 << 20
"""Bytes of a node's object store: nothing large goes through it."""


@pytest.fixture(scope="module")
def cluster():
    """A head for Flower's own actors and two nodes with room for a worker each: (Cluster, [node])."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    os.environ["RAY_worker_niceness"] = "0"
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": OBJECTS}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    nodes = [made.add_node(num_cpus=0, resources={"worker": 1}, object_store_memory=OBJECTS) for _ in range(2)]
    yield made, nodes
    made.shutdown()


def _workers(node) -> set[int]:
    """Process ids of the workers that a node runs."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = set()
    for process in raylet.children():
        try:
            if " ".join(process.cmdline()).startswith("ray::Worker"):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_machine_too_busy_for_ray_stops_the_run_resumably(monkeypatch):
    import ray

    def late(**_):
        raise Exception("The current node timed out during startup.\nAnd more")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ResumableStop, match=r"Ray did not start.*timed out during startup\.\)"):
        start_here(2, 0, 2)


def test_a_worker_stays_from_call_to_call_and_is_replaced_once_dead(cluster, tmp_path):
    """The model that it holds is loaded once; a call to a dead worker says so, the next one finds a new worker."""
    import ray

    run = RunDirectory.create(tmp_path / "run", tiny())
    ray.init(address=cluster[0].address, log_to_driver=False, runtime_env=runtime_env())
    try:
        def process():
            """Which process a call reaches; every call has an executor of its own, as in a host."""
            executor = RayExecutor("worker", Post(str(run.path), Endpoint("", "")))
            executor.call("progress", 0.0, deadline_s=120)
            return ray.get(ray.get_actor("worker", RayExecutor.NAMESPACE).pid.remote())

        first = process()
        assert process() == first
        os.kill(first, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            process()
        second = process()
        assert second != first and process() == second
    finally:
        ray.shutdown()


@pytest.mark.timeout(900)
def test_a_run_that_loses_a_node_loses_nothing(cluster, tmp_path):
    made, nodes = cluster
    path, file = tmp_path / "run", tmp_path / "experiment.toml"
    fields = {"rounds": 3, "arms": "local,cloud"}
    file.write_text(tiny(**fields, engine__shard=1).to_toml())
    with Untether(str(file), "--out", str(path), "--ray-address", made.address) as run:
        wait_for(lambda: commits(path) >= 1, run)
        at_work = [_workers(node) for node in nodes]
        assert [len(found) for found in at_work] == [1, 1], "a worker a node"
        made.remove_node(nodes[1], allow_graceful=False)
        code, said = run.end()
        assert code == 0, said
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        reference = run_in_process(tmp_path / "undisturbed", tiny(**fields), endpoint)
    assert_whole(RunDirectory.open(path), reference)
    events = RunDirectory.open(path).read("events")
    died = events[events["kind"] == "worker_died"]
    assert len(died) == 1 and "its node has died" in died["detail"].item(), died["detail"].tolist()
