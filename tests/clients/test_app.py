"""Private means private: nothing of a user is in any message between a host and the server."""

import itertools
import json
import threading

import numpy as np
import pytest
from fleet import tiny
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from test_determinism import FINITE

from untether.clients import app as host
from untether.clients.device.worker import Outcome
from untether.server.coordinator import coordinate
from untether.sim.core.records import Part
from untether.sim.experiment import Experiment
from untether.sim.population.leaks import normalize
from untether.sim.population.source import open_population
from untether.sim.rounds.flower_records import order_from, reply_from, to_records
from untether.sim.rounds.messages import (
    Fetch,
    Learn,
    Refilter,
    Reply,
    RequestOf,
    Samples,
    Share,
    TrainedIn,
    Update,
    Upload,
    Version,
)
from untether.sim.run.directory import RunDirectory, versions
from untether.sim.run.places import announced


class Recorder:
    """Stands for the worker process: answers an order without carrying it out."""

    def call(self, order, inputs, *, deadline_s, progress):
        count = len(order.devices)
        columns = {"device": list(order.devices), "outcome": ["ok"] * count, "accepted": [2] * count}
        events = [{"event_id": "e", "device_id": None, "tokens_in": 7}]
        return Outcome(Reply(columns, events, models={"base embedded": "abc"}), {"metrics": []})


def _ask(monkeypatch, tmp_path, kind, order=None):
    run = RunDirectory.create(tmp_path / "run", Experiment())
    monkeypatch.setattr(host, "make_executor", lambda *_: Recorder())
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    with announced(run) as name:
        content = to_records(order) if order is not None else RecordDict()
        content["run"] = ConfigRecord({"id": name})
        message = Message(content, dst_node_id=1, message_type=kind)
        context = Context(run_id=1, node_id=1, node_config={"partition-id": 3, "num-partitions": 4},
                          state=RecordDict(), run_config={})  # fmt: skip
        return host.app(message, context).content


def test_a_reply_carries_numbers_outcomes_and_names_only(monkeypatch, tmp_path):
    content = _ask(monkeypatch, tmp_path, "query.learn", Learn(seed=1, round=0, devices=(4, 9)))
    assert content["devices"] == {"device": [4, 9], "outcome": ["ok", "ok"], "accepted": [2, 2]}
    assert content["totals"] == {"accepted": 4, "outcome.ok": 2}
    reply = reply_from(content)
    assert reply.parts == {"metrics": ["learn-d00004-d00009-2"]} and reply.models == {"base embedded": "abc"}
    assert reply.events == [{"event_id": "e", "device_id": None, "tokens_in": 7}]


def test_a_run_that_was_not_announced_is_not_found(monkeypatch, tmp_path):
    monkeypatch.setattr("untether.sim.run.places._folder", lambda: tmp_path / "nobody")
    message = Message(RecordDict({"run": ConfigRecord({"id": "abc"})}), dst_node_id=1, message_type="train")
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
    said = host.reply_to(message, context).content["error"]
    assert said["error"] == "UserError" and "does not know the run abc" in said["message"]


def test_a_host_says_which_partition_it_is(monkeypatch, tmp_path):
    said = _ask(monkeypatch, tmp_path, "query.hello")["host"]
    assert said == {"partition": 3, "versions": json.dumps(versions())}


@pytest.mark.parametrize(
    "order",
    [
        Fetch(seed=1, round=2, devices=(3, 1), due=(1, 3, 5), held=(RequestOf(3, "r3"), RequestOf(1, "r1"))),
        Refilter(seed=1, round=2, devices=(3,), lost=(RequestOf(3, "r3"),), samples=(Part(2, "fetch-a"),)),
        Share(seed=4, round=0, part=1, parts=3),
        Update(seed=1, round=2, devices=(3, 1), trained=(TrainedIn(1, 0),)),
        Learn(
            seed=1, round=2, devices=(3, 1), due=(1,), settled=0, measured="{}",
            versions=(Version(3, "local", 2, "real", 1.5, "local.first"),), trains=(Samples(1, 0, 2, "samples"),),
            uploads=(Upload(1, "r1", 0, 2.0, 0.5),), samples=(Part(1, "a"), Part(2, "b")), answers=(Part(2, "a"),),
        ),
    ],
    ids=lambda order: order.work,
)  # fmt: skip
def test_an_order_comes_as_it_was_sent(order):
    assert order_from(to_records(order)) == order
    for host_number, own in order.split(2).items():
        assert order_from(to_records(own)) == own
        assert all(device % 2 == host_number for device in own.devices)


def test_arrays_come_as_they_were_sent():
    arrays = {"LaMP_4/a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for found in (
        order_from(to_records(Learn(seed=1, round=0, arrays=arrays))), reply_from(to_records(Reply(arrays=arrays)))
    ):  # fmt: skip
        assert found.arrays.keys() == arrays.keys()
        np.testing.assert_array_equal(found.arrays["LaMP_4/a.weight"], arrays["LaMP_4/a.weight"])


def test_rows_are_for_the_device_that_they_name():
    order = Learn(seed=1, round=0, devices=(0, 1), due=(0, 1), lost=(RequestOf(0, "r0"), RequestOf(1, "r1")),
                  samples=(Part(0, "a"),))  # fmt: skip
    assert order.cut((1,)) == Learn(
        seed=1, round=0, devices=(1,), due=(0, 1), lost=(RequestOf(1, "r1"),), samples=(Part(0, "a"),)
    )


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
    experiment = tiny(**{
        **FINITE, "arms": "frozen,shared,federated,rag,local,placebo,collaborative,cloud", "rounds": 2,
        "strategy__name": "fedsa", "training__steps": 1, "training__batch_size": 1,
        "population__queries": 1,
        "population__shared_users": 2, "engine__hosts": 2, "drift__policy": "on_drift",
        "population__replay": True, "engine__track": "tensorboard",
    })  # fmt: skip
    run, wire = RunDirectory.create(tmp_path / "run", experiment), Wire()
    coordinate(wire, run, 1, Nobody(), threading.Event())

    assert list((run.path / "tensorboard").iterdir()), "the coordinator's trackers are told of its rounds"
    told = {"query.hello", "query.fetch", "query.filter", "query.share", "query.begin", "query.learn", "train"}
    assert {kind for kind, _ in wire.seen} == told and len(wire.seen) >= 2 * 2 * (2 + 2 * 3)
    population = open_population(experiment, 1)
    users = [population.user(index) for index in range(8)] + list(population.shared_users())
    texts = [text for user in users for item in user.history for text in (item.input, item.output)]
    texts += [text for user in users for query in user.queries for text in (query.input, query.gold)]
    samples, predictions = run.read("samples"), run.read("predictions")
    assert len(samples) > 20
    texts += [*samples["input"], *samples["output"], *predictions["prediction"]]
    private = {f" {normalize(text)} " for text in texts if len(text) > 9}
    assert len(private) > 150
    assert [(kind, text) for kind, words in wire.seen for text in private if text in words] == []
    assert not [kind for kind, words in wire.seen if normalize(str(tmp_path)) in words], "nor a path of the server"


def test_workers_take_the_gpus_of_a_machine_in_turn(tmp_path, monkeypatch):
    from untether.clients.device.worker import Endpoint, Worker

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    nowhere = Endpoint("http://127.0.0.1:9/v1", "none")
    workers = [Worker(Experiment(), nowhere, tmp_path, threads=1, number=number) for number in range(3)]
    assert [worker.device for worker in workers] == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert workers[1].device == "auto"
