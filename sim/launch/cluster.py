"""Ray: started on this machine for a run, or an existing cluster (`untether run --ray-address`).

On a cluster the driver, and with it the round loop and the run's own cloud gateway, stays on this machine. Workers go
wherever a node offers the resource `worker`; all nodes see run directory and code under the same path. See
docs/cluster.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from untether.sim.core import limits
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.package_data import import_root

STORE_SHARE, LEAST_STORE_BYTES, MOST_STORE_BYTES = 0.3, 100_000_000, 10_000_000_000
"""Of the object store: Ray's own default share and (about) its own minimum."""


def runtime_env() -> dict[str, Any]:
    """Returns what processes of a running cluster need to import this program as it runs here."""
    return {"env_vars": {"PYTHONPATH": _python_path()}}


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(import_root()), os.environ.get("PYTHONPATH", "")]))


@contextmanager
def _inherited(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def memory_here() -> dict[str, int]:
    """Returns the memory that Ray may use, in its own names.

    By itself Ray reads the limit of the outermost group that it sees, and no other. Its object store holds little here
    (orders and replies), so it gets the share that Ray would give it, up to 10 GB.
    """
    available = limits.available_bytes()
    store = max(LEAST_STORE_BYTES, int(min(STORE_SHARE * available, MOST_STORE_BYTES)))
    return {"object_store_memory": store, "_memory": max(LEAST_STORE_BYTES, available - store)}


def start_here(cpus: int, gpus: int, workers: int) -> None:
    """Starts Ray on this machine, for this process's lifetime.

    Args:
        cpus, gpus: What Ray may use.
        workers: How many workers there is capacity for.

    Raises:
        ResumableStop: Its processes are not up within the 30 s that Ray gives them.
    """
    import ray

    try:
        # Inherited, not by a `runtime_env`: for that, Ray would not use the processes that it starts ahead.
        with _inherited("PYTHONPATH", _python_path()):
            ray.init(
                address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, log_to_driver=False,
                configure_logging=False, resources={"worker": workers}, **memory_here(),
            )
    except Exception as error:  # a plain one is what Ray raises
        raise ResumableStop(f"Ray did not start; is this machine too busy? ({_first_line(error)})") from error


def join_cluster(address: str) -> int:
    """Connects to a cluster and returns how many workers it has capacity for.

    Raises:
        UserError: There is no cluster, or it does not offer the resource `worker` or has no CPU.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env=runtime_env())
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({_first_line(error)})") from error
    resources = ray.cluster_resources()
    workers = int(resources.get("worker", 0))
    if workers < 1 or resources.get("CPU", 0) < 1:
        ray.shutdown()
        raise UserError(
            f"--ray-address {address}: no node offers the resource `worker` (or none has a CPU). Start its nodes with: "
            "ray start ... --resources '{\"worker\": N}'"
        )
    return workers


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
