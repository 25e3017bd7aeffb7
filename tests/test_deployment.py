"""The same app on real nodes: SuperLink and SuperNodes with TLS on loopback, one killed, one cut from its cloud."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime

import pandas as pd
import psutil
import pytest
from fleet import run_in_process, tiny

from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.core.errors import Failure
from untether.sim.experiment import Experiment
from untether.sim.launch.deploy import Deployment, deployable, end
from untether.sim.population.source import device_id, open_population
from untether.sim.run.directory import RunDirectory

ARMS = "local,collaborative,cloud"
FIELDS = {"arms": ARMS, "rounds": 2, "population__tasks": "LaMP_3,LaMP_7", "population__source": "jsonl"}
KILLED, CUT = 1, 2
MEASURED = ["round", "device_id", "arm", "task", "metric"]


def lines_of(user):
    """A user of the world, a line an interaction."""
    told = [(item.item_id, item, "history") for item in user.history]
    told += [(query.query_id, query, "query") for query in user.queries]
    for name, one, split in told:
        date = datetime.fromtimestamp(one.time_s, UTC).date().isoformat()
        output = one.output if split == "history" else one.gold
        found = {"user": user.user_id, "id": name, "task": one.task, "time": date, "split": split}
        yield json.dumps({**found, "input": one.input, "output": output})


@pytest.fixture(scope="module")
def gone(tmp_path_factory):
    """A simulation, and a deployment of its users: each on a node of its own, with its data and nobody else's."""
    folder = tmp_path_factory.mktemp("deployed")
    everybody = folder / "everybody.jsonl"
    world = open_population(tiny(population__users=3, population__tasks="LaMP_3,LaMP_7"), 1)
    everybody.write_text("\n".join(line for user in map(world.user, range(3)) for line in lines_of(user)))
    experiment = tiny(**FIELDS, population__users=3, population__path=everybody)
    simulated = open_population(experiment, 1)
    with start_background("world", {}) as cloud:
        endpoint = Endpoint(cloud.base_url, cloud.model, cloud.fingerprint)
        simulation = run_in_process(folder / "simulation", experiment, endpoint)
    told, left_out = deployable(tiny(**{**FIELDS, "population__source": "world"}), 3)
    nobody_knows = told.model_dump()
    nobody_knows["population"] |= {"source": "nodes", "path": ""}
    deployment = Deployment(folder / "deployment", Experiment.build(nobody_knows, None, "the test"))
    deployment.write()
    for number in range(3):
        home, user = deployment.home(number), simulated.user(number)
        (home / "history.jsonl").write_text(
            "\n".join(line for line in everybody.read_text().splitlines() if json.loads(line)["user"] == user.user_id)
        )
    with (deployment.home(CUT) / "node.toml").open("a") as settings:
        settings.write('[cloud]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "none"\nmax_retries = 0\n')
    said, stop = [], threading.Event()

    def kill(nodes):
        while not list(deployment.run_directory.glob("state/commits/*-round-0.json")):
            time.sleep(0.2)
        end(nodes[KILLED])

    with deployment.started(folder / "log.txt") as nodes:
        threading.Thread(target=kill, args=(nodes,), daemon=True).start()
        deployment.carry_out(said.append, stop, folder / "log.txt")
    return deployment, simulation, simulated, said


@pytest.mark.timeout(600)
def test_it_ends_with_a_report_and_says_how_far_it_is(gone):
    deployment, _, _, said = gone
    run = RunDirectory.open(deployment.run_directory)
    assert run.finished and (run.path / "report.html").is_file()
    assert any("round 2 of 2" in line for line in said)


def test_metrics_are_those_of_the_simulation(gone):
    """To 1e-6: each node computes its device's batches alone, the simulation all of them together."""
    deployment, simulation, _, _ = gone
    real, virtual = (run.read("metrics") for run in (RunDirectory.open(deployment.run_directory), simulation))
    both = real.merge(virtual, on=MEASURED, suffixes=("", "_virtual"))
    well = both[(both["device_id"] == device_id(0)) | (both["round"] == 0) & (both["device_id"] == device_id(KILLED))]
    alone = both[(both["device_id"] == device_id(CUT)) & (both["arm"] == "local")]
    expected = virtual[(virtual["device_id"] == device_id(0))]
    assert len(well) == 1.5 * len(expected) > 0 and len(alone) > 0
    for rows in (well, alone):
        assert (rows["value"] - rows["value_virtual"]).abs().max() <= 1e-6 and (rows["n"] == rows["n_virtual"]).all()


def test_what_became_of_the_others_is_told(gone):
    run = RunDirectory.open(gone[0].run_directory)
    events, metrics, predictions = (run.read(table) for table in ("events", "metrics", "predictions"))
    lost = events[events["kind"] == "node_lost"]
    assert set(zip(lost["device_id"], lost["round"], strict=True)) == {(device_id(KILLED), 1)}
    assert set(lost["outcome"]) <= {"host_failed", "node_away"}
    assert set(metrics[metrics["device_id"] == device_id(KILLED)]["round"]) == {0}
    asked = events[(events["device_id"] == device_id(CUT)) & events["kind"].isin(("augment", "answer"))]
    assert set(asked["outcome"]) == {"unreachable"} and asked["detail"].str.contains("Connect").all()
    cut = predictions[predictions["device_id"] == device_id(CUT)]
    assert set(cut[cut["arm"] == "cloud"]["outcome"]) == {"no_answer"}
    assert set(cut[cut["arm"] == "collaborative"]["outcome"]) == {"ok"}
    commits = [run.committed(1, round)["facts"]["totals"] for round in range(2)]
    assert commits[0]["outcome.ok"] == 3 and commits[1]["outcome.ok"] == 2


def test_no_text_or_name_of_a_user_is_at_the_server(gone):
    deployment, _, simulated, _ = gone
    users = [simulated.user(number) for number in range(3)]
    private = {user.user_id for user in users}
    for user in users:
        private |= {text for item in user.history for text in (item.input, item.item_id) if len(text) > 3}
        private |= {text for query in user.queries for text in (query.input, query.query_id) if len(text) > 3}
    run = RunDirectory.open(deployment.run_directory)
    for path in (path for path in run.path.rglob("*") if path.is_file()):
        if path.suffix == ".parquet":
            content = pd.read_parquet(path).to_csv()
        elif path.name == "truth.jsonl":  # of the embedded cloud, which this server also runs
            continue
        else:
            content = path.read_bytes().decode(errors="replace")
        found = [text for text in private if text in content]
        assert not found, (path, found[:3])


def test_times_are_real(gone):
    run = RunDirectory.open(gone[0].run_directory)
    events, metrics = run.read("events"), run.read("metrics")
    assert metrics["time_s"].between(0, 1000).all() and events["time_s"].between(0, 1000).all()
    first, second = (metrics[metrics["round"] == round]["time_s"] for round in range(2))
    assert first.max() < second.min()


def test_a_resident_worker_outlives_messages_and_ends_with_its_node(gone):
    deployment, *_ = gone
    for number in range(3):
        log = (deployment.home(number) / "resident.log").read_text(errors="replace")
        assert log.count("worker process ") == 1, "one process for all messages"
    end_s = time.monotonic() + 20
    while any((deployment.home(number) / "resident.json").exists() for number in range(3)):
        assert time.monotonic() < end_s, "a worker is still there"
        time.sleep(0.2)


def test_each_node_keeps_its_own(gone):
    deployment, _, simulated, _ = gone
    for number in (0, CUT):
        [store] = (deployment.home(number) / "runs").iterdir()
        kept = RunDirectory.open(store)
        paths = sorted(kept.path.glob("state/parts/**/predictions/*.parquet"))
        rows = pd.concat(map(pd.read_parquet, paths))
        assert set(rows["user_id"]) == {simulated.user(number).user_id} and rows["gold"].notna().all()
        assert list((store / "adapters").rglob("*.safetensors"))


def test_a_server_that_is_gone_is_told_with_what_was_said_last(tmp_path):
    deployment = Deployment(tmp_path / "deployment", deployable(tiny(population__source="world"), 1)[0])
    deployment.write()

    def kill(line):
        if "run directory" in line:
            for process in psutil.Process().children(recursive=True):
                if str(deployment.port) in process.cmdline() and "--ssl-keyfile" in process.cmdline():
                    process.kill()

    log = tmp_path / "log.txt"
    with deployment.started(log), pytest.raises(Failure, match="the SuperLink does not answer") as failed:
        deployment.carry_out(kill, threading.Event(), log)
    *_, last = str(failed.value).splitlines()
    assert last.strip() and last.strip() in log.read_text()
