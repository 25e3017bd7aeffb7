"""The Flower ClientApp: a thin host of many devices. Orders come in, counts go out, private things stay."""

from __future__ import annotations

import functools
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from untether.clients.device.worker import Endpoint
from untether.clients.hosting.executors import Executor, InProcess, RayExecutor
from untether.clients.hosting.host import guarded, run_order
from untether.clients.hosting.process import Post, WorkerProcess
from untether.sim.rounds.flower_records import order_from, to_records
from untether.sim.rounds.messages import Reply
from untether.sim.run.directory import RunDirectory
from untether.sim.run.places import find_run

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Says which partition this node is (node ids are random)."""
    partition = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"host": partition}), reply_to=message)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Trains this host's part of the `shared` arm's adapters, once for the whole fleet."""
    return carry_out(message, context)


@app.query("fetch")
def fetch(message: Message, context: Context) -> Message:
    """Asks the cloud for this host's devices."""
    return carry_out(message, context)


@app.query("filter")
def filter_again(message: Message, context: Context) -> Message:
    """Filters again what this host's devices hold, without the answers that never reached them."""
    return carry_out(message, context)


@app.query("begin")
def begin(message: Message, context: Context) -> Message:
    """Says what is shared before anybody trained."""
    return carry_out(message, context)


@app.train()
def update(message: Message, context: Context) -> Message:
    """Trains, for this host's devices, what the strategy has them train together."""
    return carry_out(message, context)


@app.query("learn")
def learn(message: Message, context: Context) -> Message:
    """Trains and answers for this host's devices."""
    return carry_out(message, context)


def carry_out(message: Message, context: Context) -> Message:
    """Carries out the order of a message, for the run that it names."""

    def work() -> Reply:
        told = message.content["run"]
        run = find_run(str(told["id"]))
        progress = run.path / "state" / "progress" / f"{context.node_config['partition-id']}.done"
        return run_order(make_executor(told, run, context), run, order_from(message.content), progress)

    found = guarded(work)
    content = to_records(found) if isinstance(found, Reply) else RecordDict({"error": ConfigRecord(found)})
    return Message(content, reply_to=message)


def make_executor(told: ConfigRecord, run: RunDirectory, context: Context) -> Executor:
    """The worker of this host: a Ray actor, or this very process where there is no Ray."""
    partition = int(context.node_config["partition-id"])
    endpoint = Endpoint(str(told["base_url"]), str(told["model"]), str(told["fingerprint"]))
    scratch = str(Path(run.path / "state").resolve())
    post = Post(str(told["id"]), str(told["experiment"]), endpoint, scratch, int(told["threads"]), partition)
    if _in_ray():
        return RayExecutor(f"worker-{context.run_id}-{partition}", post)
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
