"""A host: a Flower node that has a share of the devices and hands them to a worker process, shard by shard.

The host does no work of its own. The worker holds the model and may die (killed, out of memory); then its devices are
run again on a new worker, in halves, until the one that kills it is found and marked while the others finish.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from untether.clients.device.worker import Inputs, Outcome
from untether.clients.hosting.executors import Executor, WorkerDied
from untether.clients.hosting.lost import lost_rows
from untether.clients.hosting.store import DeviceStore
from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import ResumableStop, UserError, disk_is_full
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import trained
from untether.sim.population.source import device_id
from untether.sim.rounds.messages import Learn, Order, Reply, joined
from untether.sim.rounds.work import Work, added, finished, written
from untether.sim.run.directory import RunDirectory

DETAIL_CHARS = 600
"""Most characters of a death's description that the events keep."""

NODES = 3
"""Nodes that may be lost under a shard before it is to blame: it can take a node's memory, and with it the node."""


T = TypeVar("T")

BLOCK_ADAPTERS = 64
"""Adapters that a worker trains at a time, about; the engine splits them into cohorts within its memory budget."""


def run_order(
    executor: Executor, run: RunDirectory, order: Order, progress: Path | None = None,
    keeper: Callable[[RunDirectory, Order], DeviceStore] = DeviceStore,
) -> Reply:  # fmt: skip
    """Carries out an order, shard by shard of devices.

    A shard that was finished before a stop is not run again. A user's mistake and a stop raise; a dead worker does not
    (unless `engine.strict`): it becomes an event, and a device that keeps killing workers is marked in all its answers.
    Workers that are ended for want of the machine's memory, even with a single device, stop the run, resumably.
    An order without devices cannot be cut: a dead worker costs it a retry.

    Args:
        executor: The host's worker.
        run: The run directory, which holds the devices' store.
        order: The order, cut to this host's devices.
        progress: A file to write the number of finished devices to.
        keeper: Opens the devices' store.
    """
    engine, watch = run.experiment.engine, _Watch(progress)
    store = keeper(run, order)
    if not order.devices:
        outcome = _call_again(executor, order, store.inputs(order), engine.deadline_s, watch)
        return store.told(order, store.keep(order, outcome))
    replies: list[Reply] = []
    size = _shard_size(run.experiment, order)
    queue = [order.devices[start : start + size] for start in range(0, len(order.devices), size)][::-1]
    deaths: dict[tuple[int, ...], int] = dict.fromkeys(queue, -1)  # a whole shard may die once more than a half
    nodes: dict[tuple[int, ...], int] = {}
    failures: list[dict[str, Any]] = []
    lost: dict[int, str] = {}
    while queue:
        some = queue.pop()
        shard = order.cut(some)
        reply, outcome = store.kept(shard), None
        if reply is None:
            try:
                outcome = executor.call(shard, store.inputs(shard), deadline_s=engine.deadline_s, progress=watch)
                reply = store.keep(shard, outcome)
            except WorkerDied as death:
                failures.append(_failure(order.work, some, death))
                watch.deaths(len(failures))
                if engine.strict:
                    raise ResumableStop(f"a worker died ({death}) and engine.strict is set") from death
                if death.with_node and nodes.setdefault(some, NODES) > 0:
                    nodes[some] -= 1
                    queue.append(some)
                    continue
                deaths[some] = deaths.get(some, 0) + 1
                if len(some) > 1 and deaths[some] > 0:
                    queue += [some[len(some) // 2 :], some[: len(some) // 2]]
                elif deaths[some] > 1:
                    _not_for_memory(death)
                    lost[some[0]] = "out_of_memory" if death.outcome == "out_of_memory" else "crashed"
                    watch.add(1)
                else:
                    queue.append(some)
                continue
        watch.add(len(some), {} if outcome is None else outcome.work)
        replies.append(reply)
    return store.told(order, joined([*replies, _lost_reply(run, order, lost, failures)]))


def _shard_size(experiment: Experiment, order: Order) -> int:
    """Devices that a worker is given at a time: their adapters, too, travel to it and back in one piece."""
    most = BLOCK_ADAPTERS // max(1, len(trained(experiment.arms))) if order.work == "learn" else experiment.engine.shard
    return max(1, min(experiment.engine.shard, most))


def _call_again(
    executor: Executor, order: Order, inputs: Inputs, deadline_s: float, watch: _Watch, tries: int = 3
) -> Outcome:
    for _ in range(tries - 1):
        with contextlib.suppress(WorkerDied):
            return executor.call(order, inputs, deadline_s=deadline_s, progress=watch)
    try:
        return executor.call(order, inputs, deadline_s=deadline_s, progress=watch)
    except WorkerDied as death:
        _not_for_memory(death)
        raise


def _not_for_memory(death: WorkerDied) -> None:
    """Raises ResumableStop where the machine had no memory left even for the smallest order: no device is to blame."""
    if death.pressed:
        raise ResumableStop(
            f"memory ran out on this machine, and a worker was ended for it again and again ({str(death)[:200]}). End "
            "other programs, or take fewer engine.workers; then resume the run"
        ) from death


class _Watch:
    """Writes a host's progress into a small file for observers. A full disk is ignored here: other writes report it."""

    def __init__(self, path: Path | None):
        self.path, self._done = path, dict[str, float]()
        if path is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
        self({})

    def __call__(self, of_shard: Work) -> None:
        self._write(self.path, written(added([self._done, of_shard])))

    def add(self, devices: int, work: Work | None = None) -> None:
        """Adds finished devices, with the work that they took."""
        self._done = added([self._done, finished(work or {}, devices)])
        self({})

    def deaths(self, count: int) -> None:
        """Writes the number of workers that died."""
        self._write(self.path and self.path.with_suffix(".deaths"), "x" * count)

    @staticmethod
    def _write(path: Path | None, text: str) -> None:
        if path is not None:
            with contextlib.suppress(OSError):
                whole = path.with_suffix(".new")  # whoever reads meanwhile reads the old one
                whole.write_text(text)
                os.replace(whole, path)


def _failure(work: str, devices: Sequence[int], death: WorkerDied) -> dict[str, Any]:
    return {"devices": list(devices), "pass": work, "outcome": death.outcome, "detail": str(death)[:DETAIL_CHARS]}


def _lost_reply(
    run: RunDirectory, order: Order, lost: Mapping[int, str], failures: Sequence[Mapping[str, Any]]
) -> Reply:
    """The failures: an event a death, the lost devices and, in the learn pass, their rows of the tables."""
    tables = lost_rows(run.experiment, order.cut(sorted(lost)), lost) if lost and isinstance(order, Learn) else {}
    name = f"{order.work}-host-{device_id(order.devices[0])}"
    for table, rows in tables.items():
        run.write_part(table, order.seed, order.round, name, rows)
    return Reply(
        lost=lost, failures=failures,
        events=[_event(order, number, failure) for number, failure in enumerate(failures)],
        parts={table: [name] for table in tables},
    )  # fmt: skip


def _event(order: Order, number: int, failure: Mapping[str, Any]) -> dict[str, Any]:
    devices = failure["devices"]
    names = f"{device_id(devices[0])} to {device_id(devices[-1])} ({len(devices)} devices)"
    return {
        "time_s": order.round * DAY_S, "attempt": number, "kind": "worker_died", "outcome": failure["outcome"],
        "event_id": f"died-s{order.seed}-r{order.round}-{failure['pass']}-{device_id(devices[0])}-{number}",
        "device_id": device_id(devices[0]) if len(devices) == 1 else None,
        "detail": f"{failure['pass']} of {names}: {failure['detail']}",
    }  # fmt: skip


def guarded(work: Callable[[], T]) -> T | dict[str, str]:
    """Does some work; an error is returned as {"error": kind, "message", "traceback"}, so that no reply is lost."""
    try:
        return work()
    except (UserError, ResumableStop) as error:
        return {"error": type(error).__name__, "message": str(error), "traceback": ""}
    except Exception as error:
        if disk_is_full(error):
            message = f"a disk is full ({error}). Free some space, then resume the run."
            return {"error": "ResumableStop", "message": message, "traceback": ""}
        return {"error": "Failure", "message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
