"""Private means private: nothing of a user is in any message between a host and the server."""

import itertools
import json
import threading

from fleet import tiny
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from untether.clients import app as host
from untether.clients.device.device import Shard
from untether.server.app import coordinate
from untether.sim.population.leaks import normalize
from untether.sim.population.source import open_population
from untether.sim.run.directory import RunDirectory


class Recorder:
    """Stands for the worker process: answers a pass without doing it."""

    def call(self, method, shard, *arguments, deadline_s):
        assert isinstance(shard, Shard)
        count = len(shard.devices)
        return {
            "parts": {"metrics": [f"state/{shard.name}"]},
            "columns": {"device": list(shard.devices), "outcome": ["ok"] * count, "accepted": [2] * count},
            "models": {"base embedded": "abc"},
        }


def _ask(monkeypatch, tmp_path, kind, **order):
    from untether.sim.experiment import Experiment
    from untether.sim.run.directory import RunDirectory

    run = RunDirectory.create(tmp_path / "run", Experiment())
    monkeypatch.setattr(host, "_executor", lambda *_: Recorder())
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    record = ConfigRecord({
        "run": str(run.path), "base_url": "", "model": "", "fingerprint": "", "threads": 1, "deadline_s": 5.0,
        "seed": 1, "round": 0, "samples": [], **order,
    })  # fmt: skip
    message = Message(RecordDict({"order": record}), dst_node_id=1, message_type=kind)
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 3, "num-partitions": 4}, state=RecordDict(),
                      run_config={})  # fmt: skip
    return host.app(message, context).content


def test_a_reply_carries_numbers_outcomes_and_paths_only(monkeypatch, tmp_path):
    content = _ask(monkeypatch, tmp_path, "train", devices=[4, 9])
    assert content["devices"] == {"device": [4, 9], "outcome": ["ok", "ok"], "accepted": [2, 2]}
    assert content["totals"] == {"accepted": 4, "outcome.ok": 2}
    assert json.loads(content["result"]["parts"]) == {"metrics": ["state/d00004-d00009-2"]}


def test_a_host_says_which_partition_it_is(monkeypatch, tmp_path):
    assert _ask(monkeypatch, tmp_path, "query.hello", devices=[])["host"] == {"partition": 3}


class Wire:
    """A grid of hosts in this process, through the real ClientApp; keeps whatever goes over it, both ways."""

    NODES = (11, 12)

    def __init__(self):
        self.seen, self._replies, self._ids = [], {}, itertools.count()

    def get_node_ids(self):
        return list(self.NODES)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"m{next(self._ids)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            partition = self.NODES.index(message.metadata.dst_node_id)
            context = Context(
                run_id=1, node_id=message.metadata.dst_node_id, state=RecordDict(), run_config={},
                node_config={"partition-id": partition, "num-partitions": len(self.NODES)},
            )  # fmt: skip
            reply = host.app(message, context)
            self.seen += [(message.metadata.message_type, _words(m.content)) for m in (message, reply)]
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, ids):
        return [self._replies.pop(name) for name in ids]


class Nobody:
    """Watches no run."""

    def __getattr__(self, name):
        return lambda *_: None


def _words(content):
    """All that a message says, as words: nested and escaped as it may be, and the bytes of its arrays too."""
    said = []
    for name, record in content.items():
        for key, value in record.items():
            raw = getattr(value, "data", value)
            said += [name, key, raw.decode("utf-8", "ignore") if isinstance(raw, bytes) else str(raw)]
    return f" {normalize(' '.join(said))} "


def test_no_text_of_a_user_travels(tmp_path, monkeypatch):
    """Every message of a whole run, orders and replies of all passes, read for any text of any user: what is in a
    history, a question, a synthetic sample or an answer.
    """
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    experiment = tiny(
        arms="frozen,shared,rag,local,placebo,collaborative,cloud", rounds=2, population__users=3, cloud__samples=4,
        population__shared_users=2, engine__hosts=2, drift__policy="on_drift", population__replay=True,
    )  # fmt: skip
    run, wire = RunDirectory.create(tmp_path / "run", experiment), Wire()
    coordinate(wire, run, 1, Nobody(), threading.Event())

    told = {"query.hello", "query.fetch", "query.share", "train"}
    assert {kind for kind, _ in wire.seen} == told and len(wire.seen) >= 2 * 2 * (2 + 2 * 2)
    population = open_population(experiment, 1)
    users = [population.user(index) for index in range(3)] + list(population.shared_users())
    texts = [text for user in users for item in user.history for text in (item.input, item.output)]
    texts += [text for user in users for query in user.queries for text in (query.input, query.gold)]
    samples, predictions = run.read("samples"), run.read("predictions")
    assert len(samples) > 20
    texts += [*samples["input"], *samples["output"], *predictions["prediction"]]
    private = {f" {normalize(text)} " for text in texts if len(text) > 9}
    assert len(private) > 150
    assert [(kind, text) for kind, words in wire.seen for text in private if text in words] == []


def test_workers_take_the_gpus_of_a_machine_in_turn(finished, monkeypatch):
    from untether.clients.device.worker import Endpoint, Worker

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    nowhere = Endpoint("http://127.0.0.1:9/v1", "none")
    workers = [Worker(str(finished[0]), nowhere, threads=1, number=number) for number in range(3)]
    assert [worker.device for worker in workers] == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert workers[1].device == "auto"
