"""A host: a Flower node that carries a shard of devices and hands them to a worker process.

The host is thin on purpose. The worker holds the model and may die (killed, out of memory); then its devices are run
again on a new worker, in halves, until the one that kills it is found and marked while the others finish.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from untether.clients.device.device import Shard
from untether.clients.hosting.executors import Executor, WorkerDied
from untether.clients.hosting.lost import lost_rows
from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import ResumableStop, UserError, disk_is_full
from untether.sim.population.source import device_id
from untether.sim.rounds.orders import cut
from untether.sim.run.directory import RunDirectory

DETAIL_CHARS = 600
"""Most characters of a death's description that the events keep."""

NODES = 3
"""Nodes that may be lost under a shard before it is to blame: it can take a node's memory, and with it the node."""


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
    """Runs one pass (`fetch`, `filter` or `learn`) over the devices of an order, shard by shard.

    A shard that a stopped run has finished is not run again. Returns {"parts": {table: [path]}, "columns": {name:
    [value a device]}, "models": {name: fingerprint}, "failures": [...]}. A mistake of the user and a stop raise; a dead
    worker does not (unless `strict`): it is an event, and a device that keeps killing is marked in all its answers.
    """
    seed, round, devices = order["seed"], order["round"], list(order["devices"])
    with contextlib.suppress(OSError):
        progress.parent.mkdir(parents=True, exist_ok=True)
    done = _Pass()
    queue = [tuple(devices[start : start + shard_size]) for start in range(0, len(devices), shard_size)][::-1]
    deaths: dict[tuple[int, ...], int] = dict.fromkeys(queue, -1)  # a whole shard may die once more than a half
    nodes: dict[tuple[int, ...], int] = {}
    lost: dict[int, str] = {}
    while queue:
        _tell(progress, done.devices)
        some = queue.pop()
        shard = Shard(seed, round, some)
        receipt = f"{method}-{shard.name}"
        reply = run.read_receipt(seed, round, receipt)
        if reply is None or reply["columns"]["device"] != list(some):
            try:
                reply = executor.call(method, shard, cut(order, some), deadline_s=deadline_s)
            except WorkerDied as death:
                done.failures.append(_failure(method, some, death))
                _tell(progress.with_suffix(".deaths"), "x" * len(done.failures))
                if strict:
                    raise ResumableStop(f"a worker died ({death}) and engine.strict is set") from death
                if death.with_node and nodes.setdefault(some, NODES) > 0:
                    nodes[some] -= 1
                    queue.append(some)
                    continue
                deaths[some] = deaths.get(some, 0) + 1
                if len(some) > 1 and deaths[some] > 0:
                    queue += [some[len(some) // 2 :], some[: len(some) // 2]]
                elif deaths[some] > 1:
                    lost[some[0]] = "out_of_memory" if death.outcome == "out_of_memory" else "crashed"
                    done.devices += 1
                else:
                    queue.append(some)
                continue
            run.write_receipt(seed, round, receipt, reply)
        with contextlib.suppress(OSError):
            progress.with_suffix(".shard").unlink(missing_ok=True)
        done.add(reply)
    for table, rows in _told(run, order, method, lost, done.failures).items():
        part = run.write_part(table, seed, round, f"{method}-host-{device_id(devices[0])}", rows)
        done.parts.setdefault(table, []).append(part)
    done.columns.setdefault("device", []).extend(lost)
    done.columns.setdefault("outcome", []).extend(lost.values())
    _tell(progress, done.devices)
    return {"parts": done.parts, "columns": done.columns, "models": done.models, "failures": done.failures}


def call_again(executor: Executor, method: str, *arguments: Any, deadline_s: float, tries: int = 3) -> dict[str, Any]:
    """A call that is no shard of devices and cannot be halved: a dead worker costs a retry, the last one raises."""
    for _ in range(tries - 1):
        with contextlib.suppress(WorkerDied):
            return executor.call(method, *arguments, deadline_s=deadline_s)
    return executor.call(method, *arguments, deadline_s=deadline_s)


class _Pass:
    """What the shards of a pass have replied so far."""

    def __init__(self) -> None:
        self.devices = 0
        self.parts: dict[str, list[str]] = {}
        self.columns: dict[str, list[Any]] = {}
        self.models: dict[str, str] = {}
        self.failures: list[dict[str, Any]] = []

    def add(self, reply: Mapping[str, Any]) -> None:
        for table, paths in reply["parts"].items():
            self.parts.setdefault(table, []).extend(paths)
        for name, values in reply["columns"].items():
            self.columns.setdefault(name, []).extend(values)
        self.models |= reply["models"]
        self.devices += len(reply["columns"]["device"])


def _failure(method: str, devices: Sequence[int], death: WorkerDied) -> dict[str, Any]:
    return {"devices": list(devices), "pass": method, "outcome": death.outcome, "detail": str(death)[:DETAIL_CHARS]}


def _told(
    run: RunDirectory, order: Mapping[str, Any], method: str, lost: Mapping[int, str],
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Rows for what went wrong: an event a death and, in the learn pass, what the tables hold of lost devices."""
    seed, round = order["seed"], order["round"]
    tables = lost_rows(run.experiment, order, lost) if lost and method == "learn" else {}
    if failures:
        tables["events"] = [_event(seed, round, number, failure) for number, failure in enumerate(failures)]
    return tables


def _event(seed: int, round: int, number: int, failure: Mapping[str, Any]) -> dict[str, Any]:
    devices = failure["devices"]
    names = f"{device_id(devices[0])} to {device_id(devices[-1])} ({len(devices)} devices)"
    return {
        "time_s": round * DAY_S, "attempt": number, "kind": "worker_died", "outcome": failure["outcome"],
        "event_id": f"died-s{seed}-r{round}-{failure['pass']}-{device_id(devices[0])}-{number}",
        "device_id": device_id(devices[0]) if len(devices) == 1 else None,
        "detail": f"{failure['pass']} of {names}: {failure['detail']}",
    }  # fmt: skip


def _tell(progress: Path, what: object) -> None:
    """For whoever watches: a full disk is found by what matters."""
    with contextlib.suppress(OSError):
        progress.write_text(str(what))


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a pass; what goes wrong comes back as {"error": kind, "message", "traceback"}, never as a lost reply."""
    try:
        return work()
    except (UserError, ResumableStop) as error:
        return {"error": type(error).__name__, "message": str(error), "traceback": ""}
    except Exception as error:
        if disk_is_full(error):
            message = f"a disk is full ({error}). Free some space, then resume the run."
            return {"error": "ResumableStop", "message": message, "traceback": ""}
        return {"error": "Failure", "message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
