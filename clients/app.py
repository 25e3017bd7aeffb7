"""The Flower ClientApp: a thin host of many devices. Orders come in, counts go out, private things stay."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from untether.clients.device.worker import Endpoint
from untether.clients.hosting.executors import Executor, InProcess, RayExecutor
from untether.clients.hosting.host import call_again, guarded, run_pass
from untether.clients.hosting.process import Post, WorkerProcess
from untether.sim.rounds.messages import Reply
from untether.sim.run.directory import RunDirectory

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Says which partition this node is (node ids are random)."""
    partition = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"host": partition}), reply_to=message)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Trains this host's part of the `shared` arm's adapters, once for the whole fleet."""
    order = message.content["order"]

    def work() -> dict[str, Any]:
        executor, which = _executor(order, context), (order["seed"], order["part"], order["parts"])
        call_again(executor, "share", *which, deadline_s=order["deadline_s"])
        return {"parts": {}, "columns": {}, "models": {}, "failures": []}

    return _reply(message, guarded(work))


@app.query("fetch")
def fetch(message: Message, context: Context) -> Message:
    """Asks the cloud for this host's devices."""
    return _pass("fetch", message, context)


@app.query("filter")
def filter_again(message: Message, context: Context) -> Message:
    """Filters again what this host's devices hold, without the answers that never reached them."""
    return _pass("filter", message, context)


@app.train()
def learn(message: Message, context: Context) -> Message:
    """Trains and answers for this host's devices."""
    return _pass("learn", message, context)


def _pass(method: str, message: Message, context: Context) -> Message:
    order = dict(message.content["order"])

    def work() -> dict[str, Any]:
        run = RunDirectory.open(order["run"])
        engine = run.experiment.engine
        return run_pass(
            _executor(order, context), method, run, order, engine.shard, engine.deadline_s,
            _progress(order, context).with_suffix(".done"), engine.strict,
        )

    return _reply(message, guarded(work))


def _reply(message: Message, result: dict[str, Any]) -> Message:
    columns = result.pop("columns", {})
    content = RecordDict({
        "result": ConfigRecord({name: json.dumps(value) for name, value in result.items()}),
        "devices": ConfigRecord({name: list(values) for name, values in columns.items() if values}),
        "totals": MetricRecord(Reply(columns).counts()),
    })
    return Message(content, reply_to=message)


def _progress(order: Any, context: Context) -> Path:
    folder = Path(order["run"]) / "state" / "progress"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / str(context.node_config["partition-id"])


def _executor(order: Any, context: Context) -> Executor:
    partition, run_id = context.node_config["partition-id"], context.run_id
    progress = _progress(order, context).with_suffix(".shard")
    endpoint = Endpoint(order["base_url"], order["model"], order["fingerprint"])
    post = Post(str(order["run"]), endpoint, int(order["threads"]), str(progress), int(partition))
    if _in_ray():
        return RayExecutor(f"worker-{run_id}-{partition}", post)
    return InProcess(lambda: _here().at(post))


@functools.cache
def _here() -> WorkerProcess:
    """This very process as the worker: where there is no Ray."""
    return WorkerProcess()


def _in_ray() -> bool:
    try:
        import ray
    except ImportError:
        return False
    return ray.is_initialized()
