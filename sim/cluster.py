"""Joining a Ray cluster that somebody else started (`untether run --ray-address`).

The driver, and with it the round loop and the run's own cloud gateway, stays on this machine. Workers go wherever a
node offers the resource `worker`; all nodes see run directory and code under the same path. See docs/cluster.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sim.errors import UserError


def runtime_env() -> dict[str, Any]:
    """What Ray's processes need to import this program as it runs here."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {"env_vars": {"PYTHONPATH": path}}


def join_cluster(address: str) -> int:
    """Connects to a cluster and returns how many workers it has room for.

    Raises UserError where there is no cluster, or one that does not offer the resource `worker` or has no CPU.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env=runtime_env())
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({reason})") from error
    resources = ray.cluster_resources()
    workers = int(resources.get("worker", 0))
    if workers < 1 or resources.get("CPU", 0) < 1:
        ray.shutdown()
        raise UserError(
            f"--ray-address {address}: no node offers the resource `worker` (or none has a CPU). Start its nodes with: "
            "ray start ... --resources '{\"worker\": N}'"
        )
    return workers
