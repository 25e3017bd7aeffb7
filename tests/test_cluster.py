"""A run on a Ray cluster of several nodes (here: on one machine), one of which dies on the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fleet import make_post, run_in_process, tiny
from survival import Untether, commits, wait_for
from test_survival import assert_whole

from untether.clients.device.worker import Endpoint, Inputs
from untether.clients.hosting.executors import RayExecutor, WorkerDied
from untether.clients.stores.adapter_store import AdapterStore
from untether.server.background import start_background
from untether.sim.core.errors import ResumableStop
from untether.sim.launch.cluster import runtime_env, start_here
from untether.sim.rounds.messages import Fetch
from untether.sim.run.directory import RunDirectory

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


def _workers(node: int) -> set[int]:
    """Process ids of the workers that a node runs; `node` is its raylet, or what started that."""
    found = set()
    for process in psutil.Process(node).children(recursive=True):
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

    run = RunDirectory.create(tmp_path / "run", tiny(arms="local"))
    ray.init(address=cluster[0].address, log_to_driver=False, runtime_env=runtime_env())
    try:
        def process():
            """Which process a call reaches; every call has an executor of its own, as in a host."""
            executor = RayExecutor("worker", make_post(run))
            executor.call(Fetch(seed=1, round=0, devices=(0,)), Inputs(), deadline_s=120)
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


@pytest.fixture
def node_apart(cluster, tmp_path):
    """A third node, which sees an empty folder where the others see the test's: its process id."""
    alone = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*alone, f"mount -t tmpfs none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("not allowed to give a process a file system of its own")
    ray = f"{Path(sys.executable).parent}/ray start --address {cluster[0].address} --block --num-cpus 0"
    command = f"mount -t tmpfs none {tmp_path} && exec {ray} --resources '{{\"worker\": 1}}'"
    node = subprocess.Popen([*alone, f"{command} --object-store-memory {OBJECTS}"], start_new_session=True)
    yield node.pid
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(60)


@pytest.mark.timeout(900)
def test_a_node_without_the_run_directory_works_and_one_that_is_lost_loses_nothing(cluster, node_apart, tmp_path):
    """Going on with adapters, foreign samples for the placebo, answers of the cloud: all that a worker reads."""
    made, nodes = cluster
    path, file = tmp_path / "run", tmp_path / "experiment.toml"
    fields = {"rounds": 3, "arms": "placebo,collaborative,shared,cloud", "population__shared_users": 4}
    file.write_text(tiny(**fields, engine__shard=1, engine__hosts=3, engine__workers=3).to_toml())
    there = Path(f"/proc/{node_apart}/root{tmp_path}")
    with Untether(str(file), "--out", str(path), "--ray-address", made.address) as run:
        wait_for(lambda: commits(path) >= 1, run)
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        assert [len(_workers(pid)) for pid in [*raylets, node_apart]] == [1, 1, 1], "a worker a node"
        assert list(there.iterdir()) == [], "it works, and not on the disk of the others"
        made.remove_node(nodes[1], allow_graceful=False)
        code, said = run.end()
        assert code == 0, said

    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        reference = run_in_process(tmp_path / "undisturbed", tiny(**fields), endpoint)
    assert_whole(RunDirectory.open(path), reference)
    kept, expected = (
        [store.devices(round, "placebo") for round in range(3)]
        for store in (AdapterStore(path, 1), AdapterStore(reference.path, 1))
    )
    assert kept == expected, "superseded adapters are deleted at home too"
    events = RunDirectory.open(path).read("events")
    died = events[events["kind"] == "worker_died"]
    assert len(died) == 1 and "its node has died" in died["detail"].item(), died["detail"].tolist()
