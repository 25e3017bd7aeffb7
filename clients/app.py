"""The Flower ClientApp: it hands the orders of the server to a host, which carries them out for its devices.

Replies carry counts, outcomes and times. Histories, samples and private adapters stay in the devices' store.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from untether.clients.device.worker import Endpoint
from untether.clients.hosting.executors import Executor, InProcess, RayExecutor
from untether.clients.hosting.host import guarded, run_order
from untether.clients.hosting.node import Node
from untether.clients.hosting.process import Post, WorkerProcess
from untether.clients.hosting.resident import ResidentExecutor
from untether.sim.core.clock import WallClock
from untether.sim.experiment import Experiment
from untether.sim.rounds.flower_records import order_from, to_records
from untether.sim.rounds.messages import Reply
from untether.sim.run.directory import RunDirectory, versions
from untether.sim.run.places import find_run

T = TypeVar("T")

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Returns the number of the partition that this node has (node ids are random) and its version; of a deployed node
    also, where the server asks, what it may know of the node's user.
    """

    def say(node: Node | None) -> dict[str, Any]:
        said = {"partition": int(context.node_config["partition-id"]), "versions": json.dumps(versions())}
        if node is not None and "run" in message.content:
            said["told"] = json.dumps(node.told(Experiment.parse(str(message.content["run"]["experiment"]))))
        return said

    found = _said(context, say)
    return Message(RecordDict({"error" if "error" in found else "host": ConfigRecord(found)}), reply_to=message)


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

    def work(node: Node | None) -> Reply:
        return _simulated(message.content, context) if node is None else _deployed(message.content, node)

    found = _said(context, work)
    content = to_records(found) if isinstance(found, Reply) else RecordDict({"error": ConfigRecord(found)})
    return Message(content, reply_to=message)


def _said(context: Context, work: Callable[[Node | None], T]) -> T | dict[str, str]:
    """What some work returns, or its error; a deployed node keeps the words of that to itself."""
    node = guarded(lambda: Node.of(context.node_config))
    if isinstance(node, dict):
        return node
    found = guarded(lambda: work(node))
    return node.kept_to_itself(found) if node is not None and isinstance(found, dict) and "error" in found else found


def _simulated(content: RecordDict, context: Context) -> Reply:
    """A host of a simulation: it finds the run directory on this machine, which keeps what its devices keep."""
    settings = content["run"]
    run = find_run(str(settings["id"]))
    progress = run.path / "state" / "progress" / f"{context.node_config['partition-id']}.done"
    return run_order(make_executor(settings, run, context), run, order_from(content), progress)


def _deployed(content: RecordDict, node: Node) -> Reply:
    """A node of a deployment: everything is its own. Events are told at the time of the pass, since the run began."""
    settings = content["run"]
    experiment = node.experiment(Experiment.parse(str(settings["experiment"])))
    run = node.run(str(settings["id"]), experiment)
    began_s = WallClock().epoch_s() - float(settings["began_s"])
    executor = ResidentExecutor(node.home, Post(
        str(settings["id"]), experiment.to_toml(), _endpoint(settings, node), str(run.path / "state"),
        experiment.engine.threads, node.device,
    ))  # fmt: skip
    reply = run_order(executor, run, order_from(content), keeper=node.keeper)
    return replace(reply, events=[{**event, "time_s": began_s} for event in reply.events])


def _endpoint(settings: ConfigRecord, node: Node | None = None) -> Endpoint:
    """Where the cloud is: the node's own endpoint, or that of the run."""
    if node is not None and (own := node.endpoint).get("base_url"):
        return Endpoint(own["base_url"], str(own.get("model") or settings["model"]))
    where = (str(settings[name]) for name in ("base_url", "model", "fingerprint"))
    return Endpoint(*where, float(settings["limit_s"]))


def make_executor(settings: ConfigRecord, run: RunDirectory, context: Context) -> Executor:
    """Returns the executor of a simulation's host: a Ray actor where Ray runs, otherwise this process.

    Args:
        settings: What the server sends about the run: its id, experiment, cloud endpoint and threads a worker.
        run: The run directory, which gives the worker its folder for temporary files.
        context: Flower's context of this node, which gives its number.
    """
    partition = int(context.node_config["partition-id"])
    scratch = str(Path(run.path / "state").resolve())
    run_id, experiment, threads = str(settings["id"]), str(settings["experiment"]), int(settings["threads"])
    post = Post(run_id, experiment, _endpoint(settings), scratch, threads, partition)
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
