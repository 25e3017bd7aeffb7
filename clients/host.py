"""A host: a Flower node that carries a shard of devices and hands them to a worker process.

The host is thin on purpose. The worker holds the model and may die (killed, out of memory); then its devices are run
again on a new worker, in halves, until the one that kills it is found and marked while the others finish.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clients.device import Shard
from clients.worker import Worker
from sim.errors import ResumableStop, UserError
from sim.results import RunDirectory


class WorkerDied(Exception):
    """The worker process ended under a shard; its `str` says how."""


class Executor(Protocol):
    """Runs one call on a worker process; a dead worker raises WorkerDied and is replaced at the next call."""

    def call(self, method: str, *arguments: Any, deadline_s: float) -> dict[str, Any]: ...


class InProcess:
    """The executor where there is no Ray: the worker lives in this very process (a deployed node)."""

    def __init__(self, make: Callable[[], Worker]):
        self._make, self._worker = make, None

    def call(self, method: str, *arguments: Any, deadline_s: float) -> dict[str, Any]:
        """Calls the worker directly; there is no other process that could die."""
        self._worker = self._worker or self._make()
        return getattr(self._worker, method)(*arguments)


class RayExecutor:
    """A named Ray actor of our own, one a host; it outlives the Flower actor that calls it."""

    NAMESPACE = "untether"

    def __init__(self, name: str, arguments: Mapping[str, Any]):
        self.name, self.arguments = name, dict(arguments)

    def call(self, method: str, *arguments: Any, deadline_s: float) -> dict[str, Any]:
        """Calls the actor and waits at most `deadline_s`."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        actor = self._actor()
        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=deadline_s)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except (RayActorError, GetTimeoutError) as error:
            ray.kill(actor, no_restart=True)
            raise WorkerDied(str(error).strip().splitlines()[0]) from error

    def _actor(self) -> Any:
        import ray

        resources = {"worker": 1} if ray.cluster_resources().get("worker") else None
        return ray.remote(Worker).options(
            name=self.name, namespace=self.NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0,
            num_gpus=0, resources=resources, max_restarts=0, max_concurrency=1,
        ).remote(**self.arguments)


def run_pass(
    executor: Executor,
    method: str,
    run: RunDirectory,
    order: Mapping[str, Any],
    shard_size: int,
    deadline_s: float,
    progress: Path,
    strict: bool = False,
) -> dict[str, Any]:
    """Runs one pass (`fetch` or `learn`) over the devices of an order, shard by shard.

    Returns {"parts": {table: [path]}, "columns": {name: [value a device]}, "models": {name: fingerprint},
    "failures": [...]}. A mistake of the user
    and a stop raise; a dead worker does not (unless `strict`).
    """
    devices: Sequence[int] = list(order["devices"])
    parts: dict[str, list[str]] = {}
    columns: dict[str, list[Any]] = {}
    models: dict[str, str] = {}
    failures: list[dict[str, Any]] = []
    arguments = [list(order["samples"])] if method == "learn" else []
    queue = [devices[start : start + shard_size] for start in range(0, len(devices), shard_size)]
    queue.reverse()
    retried: set[tuple[int, ...]] = set()
    finished = 0
    while queue:
        progress.write_text(str(finished))
        some = tuple(queue.pop())
        shard = Shard(order["seed"], order["round"], some)
        try:
            reply = executor.call(method, shard, *arguments, deadline_s=deadline_s)
        except WorkerDied as death:
            failures.append({"devices": list(some), "pass": method, "detail": str(death)})
            if strict:
                raise ResumableStop(f"a worker died ({death}) and engine.strict is set") from death
            if some not in retried:
                retried.add(some)
                queue.append(list(some))
            elif len(some) > 1:
                queue += list(_halves(some))
            else:
                columns.setdefault("device", []).append(some[0])
                columns.setdefault("outcome", []).append("crashed")
                finished += 1
            continue
        progress.with_suffix(".shard").unlink(missing_ok=True)
        for table, paths in reply["parts"].items():
            parts.setdefault(table, []).extend(paths)
        models |= reply["models"]
        for name, values in reply["columns"].items():
            columns.setdefault(name, []).extend(values)
        finished += len(some)
    progress.write_text(str(finished))
    return {"parts": parts, "columns": columns, "models": models, "failures": failures}


def _halves(devices: Sequence[int]) -> Iterator[list[int]]:
    middle = len(devices) // 2
    yield list(devices[middle:])
    yield list(devices[:middle])


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a pass; what goes wrong comes back as {"error": kind, "message", "traceback"}, never as a lost reply."""
    try:
        return work()
    except (UserError, ResumableStop) as error:
        return {"error": type(error).__name__, "message": str(error), "traceback": ""}
    except Exception as error:
        return {"error": "Failure", "message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
