"""Killed for real, on one machine and on a Ray cluster of several nodes (here: on one machine), one of which dies.

A disturbed run has two hosts, first with room for one worker, and goes through Flower and Ray; the undisturbed one is a
single worker in this process, so that this is also the test that hosts and workers change no number, though answers are
lost.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fleet import make_post, run_in_process, tiny
from survival import Untether, assert_whole, commits, wait_for
from test_determinism import FINITE

import untether.clients.hosting.executors
from tests.conftest import untether_here
from untether.clients.device.worker import Endpoint, Inputs
from untether.clients.hosting.executors import RayExecutor, WorkerDied
from untether.clients.hosting.process import WorkerProcess
from untether.clients.stores.adapter_store import AdapterStore
from untether.server.background import start_background
from untether.sim.core.errors import ResumableStop
from untether.sim.launch.cluster import runtime_env, start_here
from untether.sim.rounds.messages import Fetch, Share
from untether.sim.run.directory import RunDirectory

#: Rounds that leave something to the next: gaps, batteries, work in flight, samples of earlier days; and all that a
#: worker reads: adapters to go on with, another user's samples for the placebo, answers of the cloud.
VIRTUAL = {
    **FINITE, "rounds": 3, "arms": "placebo,collaborative,shared,cloud", "population__shared_users": 2,
    "population__queries": 1, "training__batch_size": 1,
    "network__availability": 0.6, "network__mean_down_s": 20_000, "hardware__queries": "day",
    "hardware__train_when": "charging", "drift__samples": "keep",
}  # fmt: skip
PLAIN = tiny(**VIRTUAL)
EXPERIMENT = tiny(**VIRTUAL, engine__hosts=2, engine__workers=1, engine__shard=2)
OBJECTS = 100 << 20
"""Bytes of a node's object store: nothing large goes through it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        return run_in_process(tmp_path_factory.mktemp("undisturbed") / "run", PLAIN, endpoint)


@pytest.fixture
def moment():
    """Waits for a random moment; the draws are printed where the test fails."""
    draw = random.Random()

    def wait(most_s):
        duration_s = draw.uniform(0, most_s)
        print(f"waits {duration_s:.2f} s")
        time.sleep(duration_s)

    return wait


@pytest.fixture(scope="module")
def cluster():
    """A head for Flower's own actors and a node with room for a worker: (Cluster, the node)."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    os.environ["RAY_worker_niceness"] = "0"
    often = {"health_check_period_ms": 1000}  # that a node is lost is known in seconds, not in half a minute
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": OBJECTS, "_system_config": often}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made, made.add_node(num_cpus=0, resources={"worker": 1}, object_store_memory=OBJECTS)
    made.shutdown()


@pytest.fixture
def joined(cluster):
    """Ray, in this process, as a member of the cluster."""
    import ray

    ray.init(address=cluster[0].address, log_to_driver=False, runtime_env=runtime_env())
    yield ray
    ray.shutdown()


@pytest.fixture
def node_apart(cluster, tmp_path):
    """Another node, which sees an empty folder where the others see the test's: its process id."""
    alone = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*alone, f"mount -t tmpfs none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("not allowed to give a process a file system of its own")
    ray = f"{Path(sys.executable).parent}/ray start --address {cluster[0].address} --block --num-cpus 0"
    command = f"mount -t tmpfs none {tmp_path} && exec {ray} --resources '{{\"worker\": 1}}'"
    node = subprocess.Popen([*alone, f"{command} --object-store-memory {OBJECTS}"], start_new_session=True)
    yield node.pid
    os.killpg(node.pid, signal.SIGTERM)
    node.wait(60)


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


def test_ctrl_c_while_ray_starts_ends_at_once(tmp_path):
    file = tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT.to_toml())
    with Untether(str(file), "--out", str(tmp_path / "run")) as run:
        wait_for(lambda: (tmp_path / "run" / "log.txt").exists(), run)
        time.sleep(0.5)
        run.interrupt()
        code, said = run.end(timeout_s=120)
        assert code == 1 and "Resume with: untether run --resume" in said
        assert run.orphans() == []


def test_a_machine_too_busy_for_ray_stops_the_run_resumably(monkeypatch):
    import ray

    def late(**_):
        raise Exception("The current node timed out during startup.\nAnd more")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ResumableStop, match=r"Ray did not start.*timed out during startup\.\)"):
        start_here(2, 0, 2)


def test_a_worker_stays_from_call_to_call_and_is_replaced_once_dead(joined, tmp_path):
    """The model that it holds is loaded once; a call to a dead worker says so, the next one finds a new worker."""
    run = RunDirectory.create(tmp_path / "run", tiny(arms="local"))

    def process():
        """Which process a call reaches; every call has an executor of its own, as in a host."""
        executor = RayExecutor("worker", make_post(run))
        executor.call(Fetch(seed=1, round=0, devices=(0,)), Inputs(), deadline_s=120)
        return joined.get(joined.get_actor("worker", RayExecutor.NAMESPACE).pid.remote())

    first = process()
    assert process() == first
    os.kill(first, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        process()
    second = process()
    assert second != first and process() == second


def test_a_worker_that_no_node_takes_says_so(joined, tmp_path, monkeypatch):
    """All that is offered is taken, by an actor that does not go away."""
    monkeypatch.setattr(untether.clients.hosting.executors, "PLACED_S", 4.0)
    run = RunDirectory.create(tmp_path / "run", tiny())
    room = joined.remote(WorkerProcess).options(num_cpus=0, resources={"worker": 1})
    holder = room.remote()
    joined.get(holder.pid.remote())
    executor = RayExecutor("worker-of-nobody", make_post(run))
    with pytest.raises(ResumableStop, match=r"worker 0 was placed on no node .* 1 of the resource `worker`"):
        executor.call(Share(seed=1, round=0), Inputs(), deadline_s=60.0)


@pytest.mark.timeout(1200)
def test_a_run_killed_three_times_ends_like_an_undisturbed_one(cluster, node_apart, tmp_path, undisturbed, moment):
    """Begun on this machine, where a worker and then the coordinator is killed; resumed on a cluster of two nodes,
    of which one does not see the run directory and the other is lost.
    """
    path, file = tmp_path / "run", tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT.to_toml())

    with Untether(str(file), "--out", str(path)) as first:
        wait_for(lambda: first.workers(), first)
        moment(2)
        first.workers()[0].kill()
        wait_for(lambda: commits(path) >= 1, first)
        moment(2)
        first.kill()
        assert first.orphans() == []

    made, node = cluster
    there = Path(f"/proc/{node_apart}/root{tmp_path}")
    raylets = [node.all_processes["raylet"][0].process.pid, node_apart]
    on_both = ("--ray-address", made.address, "--set", "engine.workers=2")
    with Untether("--resume", str(path), *on_both) as second:
        wait_for(lambda: all(_workers(pid) for pid in raylets), second)
        assert [len(_workers(pid)) for pid in raylets] == [1, 1], "a worker a node"
        intruder = untether_here("run", "--resume", str(path))
        assert intruder.returncode == 2
        assert f"in use by another run (process {second.process.pid} on" in intruder.stderr
        assert list(there.iterdir()) == [], "it works, and not on the disk of the others"
        made.remove_node(node, allow_graceful=False)
        code, said = second.end()
        assert code == 0, said
        for words in ("requests", "elapsed", "collaborative", "rouge-1", "run directory", str(path), "report.html"):
            assert words in said.lower(), words
        assert "Traceback" not in said and "(raylet)" not in said

    run = RunDirectory.open(path)
    assert_whole(run, undisturbed)
    assert (run.read("samples")["verdict"] == "not_received").any(), "a finite cloud"
    kept, expected = (
        [store.devices(round, "placebo") for round in range(3)]
        for store in (AdapterStore(path, 1), AdapterStore(undisturbed.path, 1))
    )
    assert kept == expected, "superseded adapters are deleted at home too"
    died = run.read("events").query("kind == 'worker_died'")
    assert set(died["outcome"]) == {"crashed"} and died["detail"].str.len().min() > 40
    assert died["detail"].str.contains("its node has died").sum() == 1, died["detail"].tolist()

    other = untether_here("run", "--resume", str(path), "--set", "rounds=4")
    assert other.returncode == 2 and "rounds: 3 there, 4 here" in other.stderr
    again = untether_here("run", "--resume", str(path))  # nothing is left to do
    assert again.returncode == 0 and "run directory:" in again.stdout
