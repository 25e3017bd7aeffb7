"""Every wait ends: with the replies, a stop, or a deadline that starts anew while somebody gets on."""

import itertools
import json
import threading

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from untether.clients.device.worker import Endpoint
from untether.server.backends import exchange as module
from untether.server.backends.exchange import EVERYTHING, FAILURE, exchange, nodes
from untether.server.backends.flower import FlowerBackend, greet
from untether.sim.core.errors import Failure, ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.rounds.messages import Begin, Fetch
from untether.sim.run.directory import RunDirectory, versions
from untether.strategies import FleetStrategy

LEFT = object()
NOWHERE = Endpoint("http://127.0.0.1:9/v1", "none")


class Clock:
    """Time passes only where somebody waits."""

    time_s = 0.0

    def now_s(self):
        return Clock.time_s

    def sleep(self, duration_s):
        Clock.time_s += duration_s


class Grid:
    """Replies as told: `script[node]` lists what the node answers, try by try; None: never; LEFT: it is not there."""

    def __init__(self, script):
        self.script = {node: iter(answers) for node, answers in script.items()}
        self.sent, self.ids = {}, itertools.count()

    def get_node_ids(self):
        return list(self.script)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            answer = next(self.script[message.metadata.dst_node_id])
            ids.append(f"m{next(self.ids)}" if answer is not LEFT else "")
            self.sent[ids[-1]] = message, answer
        return ids

    def pull_messages(self, ids):
        for name in ids:
            assert name, "Flower answers the empty name as it does one that it has forgotten"
            message, answer = self.sent[name]
            if answer is None:
                continue
            message.metadata.__dict__["_message_id"] = name
            reply = Message(answer, reply_to=message)
            assert reply.metadata.reply_to_message_id == name
            yield reply


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Clock.time_s = 0.0
    monkeypatch.setattr(module, "WallClock", Clock)
    for name in ("_run_id", "_node_id", "_task_id"):  # as inside a run: a message asks for them
        monkeypatch.setattr(TaskIdentity, name, 1)


def _ask(script, stop=None, heartbeat=lambda replies: None, deadline_s=10.0):
    grid = Grid(script)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in script]
    return exchange(grid, messages, deadline_s, stop or threading.Event(), heartbeat)


def _said(text):
    return RecordDict({"result": ConfigRecord({"said": text})})


def _wrong(kind):
    words = {"error": kind, "message": f"a {kind}", "traceback": "line 1"}
    return RecordDict({"error": ConfigRecord(words)})


def test_replies_come_in_the_order_of_the_messages():
    replies = _ask({7: [_said("seven")], 3: [_said("three")]})
    assert [reply.content["result"]["said"] for reply in replies] == ["seven", "three"]


def test_a_host_that_dies_inside_flower_is_asked_again():
    dead = Error(code=0, reason="the actor died")
    assert _ask({1: [dead, dead, _said("at last")]})[0].content["result"]["said"] == "at last"
    assert Clock.time_s >= 2, "Ray needs a moment to start an actor again"
    with pytest.raises(Failure, match="the actor died"):
        _ask({1: [dead] * 5, 2: [_said("here")]})
    assert Clock.time_s >= 20


@pytest.mark.parametrize(
    "reason", ["OutOfMemoryError: the node was\nrunning low on memory", "ActorUnavailableError: node was running low"]
)
def test_a_host_that_is_ended_for_want_of_memory_stops_the_run_resumably(reason):
    ended = Error(code=0, reason=reason)
    with pytest.raises(ResumableStop, match="memory ran out on this machine.*node was running low.*engine.workers"):
        _ask({1: [ended] * 5})
    messages = [Message(RecordDict(), dst_node_id=1, message_type="train")]
    [lost] = exchange(Grid({1: [ended] * 5}), messages, 30.0, threading.Event(), forgiven={FAILURE})
    assert "node was running low" in lost.why, "in training together it is a straggler"


@pytest.mark.parametrize("second", [[LEFT], [Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ended"), LEFT]])
def test_a_node_that_leaves_while_it_is_addressed_is_lost_or_stops_the_run_resumably(second):
    """Flower names every message that nobody is there for with the same empty text."""
    script = {7: [_said("first")], 8: second, 9: [LEFT]}
    with pytest.raises(ResumableStop, match="2 of 3 hosts left"):
        _ask(script)
    grid = Grid(script)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in script]
    first, *others = exchange(grid, messages, 10.0, threading.Event(), forgiven=EVERYTHING)
    assert first.content["result"]["said"] == "first" and [lost.why for lost in others] == ["its node left"] * 2


class FailingGrid(Grid):
    """A grid whose SuperLink fails at each kind of call so many times, in a way of its own."""

    def __init__(self, script, failures):
        super().__init__(script)
        self.failures = {name: iter(failures) for name in ("look", "push", "pull")}

    def _fail(self, at):
        for failure in self.failures[at]:
            raise failure

    def get_node_ids(self):
        self._fail("look")
        return super().get_node_ids()

    def push_messages(self, messages):
        self._fail("push")
        return super().push_messages(messages)

    def pull_messages(self, ids):
        self._fail("pull")
        return list(super().pull_messages(ids))


def _status(code):
    request = httpx.Request("POST", "http://127.0.0.1/v1/runtime/pull-messages")
    return httpx.HTTPStatusError(f"status {code}", request=request, response=httpx.Response(code, request=request))


def test_a_superlink_that_fails_for_a_while_is_asked_again():
    grid = FailingGrid({7: [_said("at last")]}, [_status(500), httpx.ReadError("EOF (_ssl.c:1)"), _status(503)])
    assert nodes(grid, 1, 100.0, threading.Event()) == [7]
    [reply] = exchange(grid, [Message(RecordDict(), dst_node_id=7, message_type="train")], 100.0, threading.Event())
    assert reply.content["result"]["said"] == "at last" and Clock.time_s > 20


def test_a_superlink_that_goes_on_failing_stops_the_run_resumably_and_one_that_refuses_is_told_at_once():
    with pytest.raises(ResumableStop, match="SuperLink fails or cannot be reached: status 500"):
        nodes(FailingGrid({7: []}, [_status(500)] * 5), 1, 100.0, threading.Event())
    Clock.time_s = 0.0
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        nodes(FailingGrid({7: []}, [_status(403)]), 1, 100.0, threading.Event())
    assert Clock.time_s == 0.0


def test_a_silent_host_ends_in_a_resumable_stop():
    with pytest.raises(ResumableStop, match="1 of 2 hosts neither answered nor got on within 10 s"):
        _ask({1: [_said("here")], 2: [None]})
    assert 10 <= Clock.time_s < 11


def test_the_deadline_starts_anew_while_hosts_get_on():
    with pytest.raises(ResumableStop):
        _ask({1: [None]}, heartbeat=lambda replies: min(int(Clock.time_s), 45))
    assert 55 <= Clock.time_s < 56


def test_a_stop_is_heeded_at_once():
    stop = threading.Event()
    stop.set()
    with pytest.raises(ResumableStop, match="interrupted"):
        _ask({1: [None]}, stop)
    with pytest.raises(ResumableStop, match="interrupted"):
        nodes(Grid({1: []}), 2, 10.0, stop)
    assert Clock.time_s < 1


def test_what_a_host_says_went_wrong_is_raised():
    with pytest.raises(UserError, match="a UserError"):
        _ask({1: [_wrong("UserError")]})
    with pytest.raises(ResumableStop, match="a ResumableStop"):
        _ask({1: [_wrong("ResumableStop")]})
    with pytest.raises(Failure, match="a Failure\nline 1"):
        _ask({1: [_wrong("Failure")]})


def _hello(partition, **other):
    return RecordDict({"host": ConfigRecord({"partition": partition, "versions": json.dumps(versions() | other)})})


def _greet(script, **more):
    return greet(Grid(script), list(script), 10.0, threading.Event(), **more)


def test_nodes_are_known_by_their_number():
    found = _greet({71: [_hello(1)], 72: [_hello(0)]})
    assert {number: message.metadata.src_node_id for number, message in found.items()} == {1: 71, 0: 72}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (_hello(1, untether="0.0.1"), "node 1 has untether 0.0.1, .*, and the server .*Install the same version"),
        (_hello(0), "two nodes have partition-id=0"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(second, said):
    with pytest.raises(UserError, match=said):
        _greet({71: [_hello(0)], 72: [second]})


def test_what_is_forgiven_is_told_in_the_hosts_words():
    gone = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="not there")
    wrong = RecordDict({"error": ConfigRecord({"error": "UserError", "message": "my data", "traceback": ""})})
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in range(1, 5)]
    script = {1: [_said("a")], 2: [gone], 3: [wrong], 4: [None]}
    first, *others = exchange(Grid(script), messages, 10.0, threading.Event(), forgiven=EVERYTHING)
    assert first.content["result"]["said"] == "a", "and a node that is gone was asked once: its script has one answer"
    assert [lost.why for lost in others] == [
        "a host failed inside Flower: not there", "my data", "no answer within 10 s (engine.deadline_s)"
    ]  # fmt: skip


def test_an_order_that_concerns_nobody_is_carried_out_by_nobody(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Experiment())
    backend = FlowerBackend(Grid({7: []}), run, "r", FleetStrategy(), NOWHERE, 1, threading.Event(), {0: 7})
    assert backend.send(Fetch(seed=1, round=3, devices=()), lambda work: None) == []


def test_an_order_that_is_one_nodes_needs_an_answer(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Experiment.read(None, {"hardware.clock": "wall", "arms": "local"}))
    backend = FlowerBackend(Grid({8: []}), run, "r", FleetStrategy(), NOWHERE, 1, threading.Event(), {0: 7})
    backend._seen.append(8)
    with pytest.raises(ResumableStop, match="`begin`, which is one node's: its node is not there"):
        backend.send(Begin(seed=1, round=0, devices=()), lambda work: None)
