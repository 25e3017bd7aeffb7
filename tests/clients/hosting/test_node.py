"""A node decides by itself what is its own to decide, and shows nobody else's server its key."""

import json

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from untether.clients.app import app
from untether.clients.hosting.node import Node, NodeStore
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.population.source import open_population
from untether.sim.rounds.messages import Learn, Reply
from untether.sim.run.directory import RunDirectory

REAL = {"hardware.clock": "wall", "arms": "local,collaborative", "population.users": "3", "seeds": "1"}


def sent(**fields):
    return Experiment.read(None, {**REAL, **{key.replace("__", "."): value for key, value in fields.items()}})


def node(tmp_path, text="", device=2):
    (tmp_path / "node.toml").write_text(text)
    return Node.of({"home": str(tmp_path), "partition-id": device})


def lines(*users):
    return "\n".join(
        json.dumps({"user": user, "input": f"text {n}", "output": "yes", "task": "LaMP_7", "time": f"2024-01-0{n + 1}"})
        for user in users for n in range(8)
    )  # fmt: skip


def test_a_host_of_a_simulation_has_no_home():
    assert Node.of({"partition-id": 0, "num-partitions": 2}) is None


def test_without_settings_the_servers_experiment_holds_but_for_paths_and_keys(tmp_path):
    whole = sent(cloud__provider="openai", cloud__base_url="https://a.example/v1",
                 cloud__model="m", cloud__cache="/srv/a.sqlite")
    mine = node(tmp_path).experiment(whole)
    assert mine.cloud.base_url == "https://a.example/v1" and mine.cloud.api_key_env == mine.cloud.cache == ""
    assert mine.training == whole.training and mine.population == whole.population


def test_a_key_goes_to_an_endpoint_that_the_node_names(tmp_path):
    text = '[cloud]\nbase_url = "https://b.example/v1"\nmodel = "m"\napi_key_env = "B_API_KEY"\n'
    mine = node(tmp_path, text).experiment(sent()).cloud
    assert (mine.provider, mine.base_url, mine.model, mine.api_key_env) == (
        "openai", "https://b.example/v1", "m", "B_API_KEY"
    )  # fmt: skip
    with pytest.raises(UserError, match="api_key_env without base_url"):
        node(tmp_path, '[cloud]\napi_key_env = "B_API_KEY"\n').experiment(sent())


def test_a_nodes_data_are_its_own_devices(tmp_path):
    (tmp_path / "mine.jsonl").write_text(lines("anna"))
    here = node(tmp_path, '[population]\nsource = "jsonl"\npath = "mine.jsonl"\n')
    experiment = here.experiment(sent(population__source="nodes"))
    population = open_population(experiment, 1)
    assert population.user(2).user_id == "anna"
    with pytest.raises(UserError, match="data of device 2, not of device 0"):
        population.user(0)
    told = here.told(sent(population__source="nodes"))
    assert told["order"] == "time" and {task for task, _ in told["asked"]} == {"LaMP_7"}
    assert "anna" not in json.dumps(told) and "text" not in json.dumps(told)


@pytest.mark.parametrize(
    ("text", "users", "said"),
    [
        ("[population", ("anna",), "node.toml: not a TOML file"),
        ("[training]\nsteps = 1", ("anna",), "node.toml: unknown section `training`"),
        ("[cloud]\nsamples = 1", ("anna",), r"\[cloud\] unknown field `samples`"),
        ("population = 3", ("anna",), "unknown section `population`"),
        ('[population]\nsource = "jsonl"\npath = "mine.jsonl"', ("anna", "ben"), "data of 2 users"),
        ("", ("anna",), r"no \[population\]. Say where this node's user's data are"),
        ('[engine]\ndevice = "tpu"\n[population]\nsource = "jsonl"', ("anna",), "engine.device"),
    ],
)
def test_what_a_node_cannot_say_is_one_sentence(tmp_path, text, users, said):
    (tmp_path / "mine.jsonl").write_text(lines(*users))
    with pytest.raises(UserError, match=said) as error:
        node(tmp_path, text).told(sent(population__source="nodes"))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": "1,2"}, "real users come once"), ({"arms": "local,shared"}, "other users' data"),
        ({"arms": "collaborative,placebo"}, "other users' data"), ({"network__availability": "0.5"}, "its own link"),
        ({"hardware__queries": "day"}, "these are simulated"),
        ({"filters__order": "adversarial"}, "other users' items"),
    ],
)  # fmt: skip
def test_what_only_simulated_devices_can_do_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        sent(**fields)


def test_users_of_nodes_are_those_of_no_simulation():
    with pytest.raises(UserError, match="Start a deployment with `untether deploy`"):
        len(open_population(sent(hardware__clock="virtual", population__source="nodes"), 1))


def test_a_reply_has_rows_without_texts_and_names(tmp_path):
    run = RunDirectory.create(tmp_path / "run", sent())
    order = Learn(seed=1, round=0, devices=(2,))
    row = {
        "device_id": "d00002", "user_id": "anna", "arm": "local", "task": "LaMP_7", "query_id": "anna-7",
        "query_time_s": 1.7e9, "input": "hello", "prediction": "a", "gold": "b", "score": 0.5, "outcome": "ok",
        "cluster": "anna",
    }  # fmt: skip
    run.write_part("predictions", 1, 0, order.name, [row])
    run.write_part("answers", 1, 0, order.name, [{"device_id": "d00002", "text": "secret"}])
    reply = Reply({"device": [2], "outcome": ["ok"]}, parts={"predictions": [order.name], "answers": [order.name]})
    told = NodeStore(run, order, b"k" * 32).told(order, reply)
    [public] = told.tables["predictions"]
    assert set(told.tables) == {"predictions"} and public["user_id"] == "d00002" and public["score"] == 0.5
    assert not {"anna", "anna-7", "hello", "a", "b", 1.7e9} & set(public.values())
    again = NodeStore(run, order, b"k" * 32).told(order, reply).tables["predictions"][0]
    other = NodeStore(run, order, b"l" * 32).told(order, reply).tables["predictions"][0]
    assert again["query_id"] == public["query_id"] != other["query_id"]


def test_an_errors_words_stay_on_the_node(tmp_path, monkeypatch):
    """They may quote what a user wrote."""
    (tmp_path / "mine.jsonl").write_text('{"user": "anna", "input": "my secret", "output": "yes", "mood": "low"}')
    (tmp_path / "node.toml").write_text('[population]\nsource = "jsonl"\npath = "mine.jsonl"\n')
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    asked = RecordDict({"run": ConfigRecord({"experiment": sent(population__source="nodes").to_toml()})})
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 2, "home": str(tmp_path)}, state=RecordDict(),
                      run_config={})  # fmt: skip
    reply = app(Message(asked, dst_node_id=1, message_type="query.hello"), context).content["error"]
    assert reply == {
        "error": "UserError", "traceback": "", "message": "node 2: UserError; errors.log in its folder says more"
    }  # fmt: skip
    assert "unknown field `mood`" in (tmp_path / "errors.log").read_text()


def test_a_name_of_a_run_is_no_path(tmp_path):
    with pytest.raises(UserError, match="no name of a run"):
        node(tmp_path).run("../../elsewhere", sent())
