"""The main job, end to end, through the command: what a run leaves behind, and what a mistake is told."""

import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fleet import run_in_process, tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import settings, untether_here
from tests.sim.population.lamp_files import article, question, write
from untether.clients.base_model import resolve
from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ARMS as ALL_ARMS
from untether.sim.experiment.arms import FEDERATED, ORACLE
from untether.sim.launch.deploy import free_ports
from untether.sim.population.order import over_s
from untether.sim.population.source import device_id, open_population
from untether.sim.run.directory import RunDirectory
from untether.sim.run.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
ARMS = tuple(name for name in ALL_ARMS if name not in (FEDERATED, ORACLE))
"""All that need no strategy and no item withheld."""
EXPERIMENT = tiny(
    arms=",".join(ARMS), population__users=3, population__tasks="LaMP_1,LaMP_3,LaMP_4", population__queries=2,
    population__history="[4, 6]", population__shared_users=2, cloud__samples=4, training__steps=2,
    evaluation__resamples=200, engine__workers=1, engine__threads=1,
)  # fmt: skip
FLOWER = Path(sys.executable).parent / "flwr"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of every arm on embedded users, by Flower's own command as the README has it: (run directory, what
    was printed). Flower has a home and ports of its own, and the SuperLink that it leaves behind ends with the tests.
    """
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("finished") / "run"
    ports = [str(port) for port in free_ports(2)]
    environment = {
        **os.environ, "PATH": f"{FLOWER.parent}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0], "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1", "UV_OFFLINE": "1", "PIP_NO_INDEX": "1",
        "RAY_ADDRESS": "local",  # no cluster of this machine, nor one that has gone and left its address behind
    }  # fmt: skip

    def flwr(*words):
        done = subprocess.run([FLOWER, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    file = home / "small.toml"
    file.write_text(EXPERIMENT.to_toml())
    given = ("--federation-config", "num-supernodes=1", "--run-config", f'experiment="{file}" out="{out}"')
    number = re.search(r"Successfully started run (\d+)", flwr("run", ".", *given))[1]
    shown = flwr("log", number, "--stream")
    assert not (home / "runtime-envs").exists(), "nothing is installed"
    yield out, shown
    ours = [process for process in psutil.process_iter() if str(home) in said(process)]
    ours += [child for process in ours for child in process.children(recursive=True)]
    for process in ours:
        if process.is_running():
            process.kill()
    psutil.wait_procs(ours, timeout=30)


def said(process: psutil.Process) -> str:
    """A process's command."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def run(finished):
    return RunDirectory.open(finished[0])


@pytest.mark.timeout(600)
def test_flower_runs_what_the_file_says_installs_nothing_and_says_where_it_is(finished, run):
    out, shown = finished
    assert run.finished and run.experiment == EXPERIMENT
    assert f"run directory: {out}" in shown and f"report:        {out / 'report.html'}" in shown
    assert "Installing" not in shown and "Traceback" not in shown


def test_the_run_directory_holds_the_whole_contract(run):
    names = [f"{table}.parquet" for table in TABLES]
    for name in [*names, "experiment.toml", "environment.json", "summary.json", "report.html", "tables", "figures"]:
        assert (run.path / name).exists(), name
    for table in TABLES:
        assert len(run.read(table)), f"{table} is empty"
    environment = run.read_json("environment.json")
    assert environment["prompts"]["samples_user"] and environment["ended"] >= environment["started"]
    assert {name.split()[0] for name in environment["models"]} == {"base", "encoder", "cloud"}
    written = environment["templates"]["embedded"]
    assert "<|" in written["template"] and written["template_args"] == {} and written["end_tokens"] == ["<|end|>"]
    assert len(written["template_sha256"]) == len(written["tokenizer_sha256"]) == 64
    excluded = run.read_json("summary.json")["facts"]["exclusions"]
    assert all(reason.startswith("shared: ") for reason in excluded), "embedded users are left out for nothing else"
    assert not (run.path / "state" / "parts").exists(), "parts are gone once the tables hold their rows"


def test_every_arm_answers_every_query_once(run):
    predictions = run.read("predictions")
    assert not predictions.duplicated(["device_id", "arm", "query_id"]).any()
    counts = predictions.groupby(["arm", "task"]).size().unstack()
    assert set(counts.index) == set(ARMS)
    assert (counts.drop("majority") == 6).all(axis=None)
    assert np.isnan(counts.loc["majority", "LaMP_4"]), "free text has no majority"
    assert (predictions["outcome"] == "ok").all()


def test_summary_means_are_those_of_the_predictions(run):
    rows = run.read_json("summary.json")["rows"]
    predictions = run.read("predictions")
    checked = 0
    for row in rows:
        if row["reference"] is None and row["metric"] in ("accuracy", "mae", "rouge1"):
            own = predictions[(predictions["arm"] == row["arm"]) & (predictions["task"] == row["task"])]
            by_user = own.groupby("user_id")["score"].mean()
            assert row["mean"] == pytest.approx(by_user.mean()), (row["arm"], row["task"])
            checked += 1
    assert checked == 3 * len(ARMS) - 1


def test_queries_are_later_than_all_that_was_uploaded(tmp_path):
    """Dated files whose profiles go on: to the day of the first query, and past it to what was scored."""
    folder = tmp_path / "LaMP_4"
    asked = []
    for name, number in itertools.product(("ann", "bob", "cid"), (5, 9)):
        profile = [article(n, text=f"text {n} of {name}") for n in range(1, number + 3)]
        profile.append(article(5, id="told", text=f"article {name}5", title="G"))  # the earlier question, answered
        asked.append(question(f"{name}{number}", number, profile, name))
    write(folder, asked)
    values = {
        "population.source": "lamp", "population.path": str(folder), "population.users": "3", "cloud.samples": "4",
        "cloud.provider": "recombine", "training.steps": "1", "arms": "rag,local,collaborative,cloud",
        "generation.max_new_tokens": "4", "evaluation.resamples": "100",
    }  # fmt: skip
    with start_background("recombine", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        run = run_in_process(tmp_path / "run", Experiment.read(None, values), endpoint)
    check_order(run)
    ledger = run.read("ledger")
    augmentation = ledger[~ledger["request_id"].str.contains("-q")]
    assert set(augmentation["item_id"]) == {"i1", "i2", "i3", "i4"}


def check_order(run):
    """Of a run on dated users: all that was uploaded or learned from is of a day before the user's first query, but the
    question itself, which goes to the cloud that is to answer it.
    """
    predictions, ledger, population = run.read("predictions"), run.read("ledger"), open_population(run.experiment, 1)
    users = [population.user(index) for index in range(len(population))]
    over = {(device_id(n), item.item_id): over_s(item) for n, user in enumerate(users) for item in user.history}
    first = {device_id(n): min(query.time_s for query in user.queries) for n, user in enumerate(users)}
    asked = ledger["request_id"].str.contains("-q") & ledger["item_id"].isin(predictions["query_id"])
    assert asked.sum() == len(predictions[predictions["arm"] == "cloud"])
    uploaded = list(zip(ledger[~asked]["device_id"], ledger[~asked]["item_id"], strict=True))
    assert set(first) == {device for device, _ in uploaded}
    assert all(over[device, item] <= first[device] // DAY_S * DAY_S for device, item in uploaded)
    learned = predictions[predictions["data_until_s"].notna()]
    assert set(learned["arm"]) >= {"rag", "local", "collaborative", "cloud"}
    assert (learned["data_until_s"] // DAY_S < learned["device_id"].map(first) // DAY_S).all()
    later = {device for (device, _), end_s in over.items() if end_s > first[device]}
    assert later, "no history goes on past its first query: this says nothing"


def test_samples_carry_scores_verdicts_and_the_truth(run):
    samples = run.read("samples")
    assert set(samples["verdict"]) <= {"accepted", *(f"rejected_by:{name}" for name in
                                       ("semantic", "diversity", "length", "leak"))}  # fmt: skip
    assert samples["truth"].notna().all()
    accepted = samples[samples["verdict"] == "accepted"]
    limits = run.experiment.filters
    assert accepted["semantic"].between(limits.semantic.low, limits.semantic.high).all()
    assert (1 - accepted["diversity"] <= limits.diversity.max_similarity + 1e-6).all()


def test_training_arms_differ_only_by_what_the_design_says(run):
    steps = run.read("training").groupby(["device_id", "arm"])["step"].max().unstack() + 1
    assert (steps == 2).all(axis=None), "training.steps = 2 for every arm"
    versions = run.read("predictions").groupby(["device_id", "arm"])["adapter_version"].nunique().unstack()
    for arm in ("local", "placebo", "collaborative"):
        assert (versions[arm] == 1).all()
    assert (versions["frozen"] == 0).all()


def test_an_exported_adapter_loads_in_peft_and_changes_the_model(run, tmp_path):
    done = untether_here("export", str(run.path), str(tmp_path / "adapter"), "--device", "d00001")
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded"), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not torch.allclose(adapted(ids).logits, before)
    wrong = untether_here("export", str(run.path), str(tmp_path / "other"), "--device", "d00009")
    assert wrong.returncode == 2 and "d00000 to d00002" in wrong.stderr


def test_a_finished_run_can_be_reported_again_and_is_not_overwritten(finished):
    path, _ = finished
    again = untether_here("report", str(path))
    assert again.returncode == 0 and "collaborative" in again.stdout
    refused = untether_here("run", "--out", str(path), *settings({"population.users": "3"}))
    assert refused.returncode == 2 and "already holds a run" in refused.stderr


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.dumps({"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_an_endpoint_that_refuses_the_key_is_the_users_mistake(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MY_API_KEY", "sk-secret-words")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    experiment = tiny(
        arms="frozen,local,collaborative", population__users=2, cloud__provider="openai", cloud__base_url=url,
        cloud__model="gpt-x", cloud__api_key_env="MY_API_KEY",
    )  # fmt: skip
    with pytest.raises(UserError) as refused:
        run_in_process(tmp_path / "run", experiment, Endpoint(url, "gpt-x"))
    server.shutdown()
    assert url in str(refused.value) and "MY_API_KEY" in str(refused.value)
    kept = "".join(path.read_text(errors="ignore") for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert "sk-secret-words" not in str(refused.value) + kept


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"strategy.name": "fedavg"}, "Known: private"),
        ({"population.tasks": "LaMP_9"}, "LaMP_9"),
        ({"drift.policy": "sometimes"}, "Known: every, never"),
        ({"hardware.profiles": "pixel-9000"}, "pixel-9000"),
        ({"network.kind": "trace", "network.traces": "/nowhere"}, "/nowhere"),
        ({"model.base": "/nowhere/model"}, "model.base"),
        ({"cloud.provider": "opnai"}, "Did you mean `openai`"),
        ({"population.source": "lamp", "population.path": "/nowhere"}, "/nowhere"),
        ({"filters.order": "semantic,length,taste"}, "taste"),
        ({"cloud.provider": "openai", "cloud.base_url": "https://api.example.com/v1", "cloud.model": "m",
          "cloud.api_key_env": "NO_SUCH_API_KEY"}, "NO_SUCH_API_KEY"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_starts(tmp_path, values, said):
    done = untether_here("run", "--out", str(tmp_path / "run"), *settings(values))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_lamp_folder_without_outputs(tmp_path):
    (tmp_path / "dev_questions.json").write_text("[]")
    done = untether_here("run", *settings({"population.source": "lamp", "population.path": str(tmp_path)}))
    assert done.returncode == 2 and "dev_outputs.json" in done.stderr


def test_help_is_short_and_leads_to_every_field():
    shown = untether_here("experiment", "show")
    helped = untether_here("run", "--help")
    assert shown.returncode == helped.returncode == 0
    assert Experiment.model_validate(__import__("tomllib").loads(shown.stdout)) == Experiment()
    assert "experiment show" in helped.stdout and "experiment explain" in helped.stdout
    for field in ("lora.rank", "cloud.samples", "filters.semantic.low", "population.path", "strategy.name"):
        assert field.rpartition(".")[2] in shown.stdout
