"""The Flower ClientApp: it hands the orders of the server to a host, which carries them out for its devices.

Replies carry counts, outcomes and times. Histories, samples and private adapters stay in the devices' store.
"""

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
    """Returns the number of the partition that this node has (node ids are random)."""
    partition = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"host": partition}), reply_to=message)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Trains this host's part of the `shared` arm's adapters, once for the whole fleet."""
    return reply_to(message, context)


@app.query("fetch")
def fetch(message: Message, context: Context) -> Message:
    """Asks the cloud for this host's devices."""
    return reply_to(message, context)


@app.query("filter")
def filter_again(message: Message, context: Context) -> Message:
    """Filters the samples of this host's devices again, without the answers that never reached their device."""
    return reply_to(message, context)


@app.query("begin")
def begin(message: Message, context: Context) -> Message:
    """Says what is shared before anybody trained."""
    return reply_to(message, context)


@app.train()
def update(message: Message, context: Context) -> Message:
    """Trains, for this host's devices, what the strategy has them train together."""
    return reply_to(message, context)


@app.query("learn")
def learn(message: Message, context: Context) -> Message:
    """Trains adapters and answers queries for this host's devices."""
    return reply_to(message, context)


def reply_to(message: Message, context: Context) -> Message:
    """Carries out the order in a message, for the run that the message names, and returns the reply as a message."""

    def work() -> Reply:
        settings = message.content["run"]
        run = find_run(str(settings["id"]))
        progress = run.path / "state" / "progress" / f"{context.node_config['partition-id']}.done"
        return run_order(make_executor(settings, run, context), run, order_from(message.content), progress)

    found = guarded(work)
    content = to_records(found) if isinstance(found, Reply) else RecordDict({"error": ConfigRecord(found)})
    return Message(content, reply_to=message)


def make_executor(settings: ConfigRecord, run: RunDirectory, context: Context) -> Executor:
    """Returns the executor of this host: a Ray actor where Ray runs, otherwise this process.

    Args:
        settings: What the server sends about the run: its id, experiment, cloud endpoint and threads a worker.
        run: The run directory, which gives the worker its folder for temporary files.
        context: Flower's context of this node, which gives its number.
    """
    partition = int(context.node_config["partition-id"])
    where = (str(settings[name]) for name in ("base_url", "model", "fingerprint"))
    endpoint = Endpoint(*where, float(settings["limit_s"]))
    scratch = str(Path(run.path / "state").resolve())
    run_id, experiment, threads = str(settings["id"]), str(settings["experiment"]), int(settings["threads"])
    post = Post(run_id, experiment, endpoint, scratch, threads, partition)
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
