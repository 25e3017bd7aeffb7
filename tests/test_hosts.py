"""Workers on the real runtime: one that finds no place says so. (More hosts than workers: `test_survival`.)"""

import pytest
from fleet import make_post, tiny

import untether.clients.hosting.executors
from untether.clients.device.worker import Inputs
from untether.clients.hosting.executors import RayExecutor
from untether.clients.hosting.process import WorkerProcess
from untether.sim.core.errors import ResumableStop
from untether.sim.launch.cluster import start_here
from untether.sim.rounds.messages import Share
from untether.sim.run.directory import RunDirectory


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
