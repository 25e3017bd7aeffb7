"""Private means private: nothing of a user is in any message between a host and the server."""

import json
import shutil

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import app as host
from clients.device import Shard


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
    from sim.experiment import Experiment
    from sim.results import RunDirectory

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


def test_no_text_of_a_user_travels(finished, tmp_path):
    """The columns that the real passes return, looked at for any text of any user."""
    from clients.worker import Endpoint, Worker
    from sim.results import RunDirectory

    run = RunDirectory.open(shutil.copytree(finished[0], tmp_path / "run"))
    worker = Worker(str(run.path), Endpoint("http://127.0.0.1:9/v1", "none"), threads=1)
    order = {"settled": -1, "due": [], "measured": "{}", "sample_parts": [], "answer_parts": []}
    reply = worker.learn(Shard(1, 0, (0, 1)), order)
    said = json.dumps(reply)
    users = [worker.population(1).user(index) for index in range(2)]
    texts = [text for user in users for item in user.history for text in (item.input, item.output) if len(text) > 9]
    texts += [query.gold for user in users for query in user.queries if len(query.gold) > 9]
    assert len(texts) > 20 and not [text for text in texts if text in said]


def test_workers_take_the_gpus_of_a_machine_in_turn(finished, monkeypatch):
    from clients.worker import Endpoint, Worker

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    nowhere = Endpoint("http://127.0.0.1:9/v1", "none")
    workers = [Worker(str(finished[0]), nowhere, threads=1, number=number) for number in range(3)]
    assert [worker.device for worker in workers] == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert workers[1].device == "auto"
