"""Plug-ins: each one that `docs/extending.md` shows does what it says, in a run where it takes part in one; and what a
user is told of one that is wrong.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fleet import NOWHERE, Silent, make_worker, run_in_process, tiny

from tests.conftest import untether_here
from tests.sim.population.lamp_files import write
from tests.test_docs_hold import blocks
from untether.clients.device.worker import Endpoint
from untether.plugins import Section, apart, register
from untether.server.background import start_background
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.plugins import fingerprints, load_plugins
from untether.sim.launch.runtime import check, prepare, reopen
from untether.sim.population.source import device_id, open_population
from untether.sim.rounds.messages import Reply
from untether.sim.rounds.tracking import tracked
from untether.sim.run.directory import RunDirectory
from untether.sim.studies import Study, run_study
from untether.sim.time.policies import alarm
from untether.sim.time.timeline import Timeline
from untether.strategies import open_strategy
from untether.strategies.shared_lora import Site

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
SMALL = {
    "arms": "local,collaborative", "population.users": "2", "population.queries": "2", "training.steps": "1",
    "generation.max_new_tokens": "4", "cloud.samples": "4", "engine.threads": "1", "evaluation.resamples": "100",
}  # fmt: skip


def examples() -> dict[str, tuple[str, str]]:
    """By the name of its file: the code of each section, and the experiment (or study) that uses it."""
    found = [text for language, text in blocks(PAGE) if language in ("python", "toml")]
    return {re.match(r"# (\w+)\.py", code)[1]: (code, toml) for code, toml in zip(found[::2], found[1::2], strict=True)}


@pytest.fixture(autouse=True)
def nothing_stays():
    with apart():
        yield


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Writes a section's two files and reads the experiment, small; `changes` are fields."""

    def read(name: str, **changes: str) -> Experiment:
        monkeypatch.chdir(tmp_path)
        code, toml = examples()[name]
        (tmp_path / "files").mkdir()
        (tmp_path / "files" / f"{name}.py").write_text(code)
        (tmp_path / "files" / "my.toml").write_text(toml)
        given = {key.replace("__", "."): value for key, value in changes.items()}
        named = tomllib.loads(toml).get("population", {})
        tasks = {} if "tasks" in named else {"population.tasks": "LaMP_4"}
        return Experiment.read(tmp_path / "files" / "my.toml", SMALL | tasks | given)

    return read


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A worker whose models are there."""
    return make_worker(RunDirectory.create(tmp_path_factory.mktemp("held") / "run", tiny()), NOWHERE)


@pytest.fixture
def ran(tmp_path, held):
    """Runs an experiment in this process, on a cloud in another one."""

    def run(experiment: Experiment) -> RunDirectory:
        check(experiment)
        provider = experiment.cloud.provider
        options = experiment.settings.get(provider, {})
        with start_background(provider, options, plugins=experiment.plugins) as gateway:
            endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
            return run_in_process(tmp_path / "run", experiment, endpoint, worker=held)

    return run


def test_every_kind_has_its_section():
    assert len(examples()) == 11


def test_filter(example, ran):
    experiment = example("neighbours")
    assert experiment.settings == {"neighbours": {"threshold": 0.3, "neighbours": 5}}
    assert Path(experiment.plugins[0]).is_absolute()
    run = ran(experiment)
    assert run.experiment == experiment
    samples = run.read("samples")
    scores = samples["scores"].map(json.loads).map(lambda scores: scores["neighbours"])
    assert len(samples) and scores.between(0, 1).all()
    judged = samples["verdict"].isin(["accepted", "rejected_by:neighbours"])
    assert ((samples["verdict"] == "accepted") == (scores >= 0.3))[judged].all() and judged.any()


def test_policy(example, ran):
    run = ran(example("weekdays", arms="local"))
    assert set(run.read("events").query("kind == 'train'")["round"]) == {1}


def test_detector(example, ran):
    experiment = example("streak", arms="collaborative")
    assert alarm(experiment.drift, [0, 1, 0, 1, 1, 0], experiment.settings) == 4
    assert alarm(experiment.drift, [0, 1, 0, 1], experiment.settings) is None
    assert set(ran(experiment).read("events").query("kind == 'train'")["round"]) >= {0}


def test_link(example, ran):
    experiment = example("commuter")
    link = Timeline(experiment, 1, device_id).link(0)
    assert link.seconds_up(0, 86_400) == pytest.approx(22 * 3600)
    assert link.is_up(6.9 * 3600) and not link.is_up(8.5 * 3600)
    assert set(ran(experiment).read("events")["outcome"]) == {"ok"}


def test_task_and_metric(example, ran, tmp_path):
    diffs = [{"id": f"c{n}", "diff": f"line {n} of the file changes", "message": f"Change line {n}"} for n in range(5)]
    ask = "Write a message for the following change: another line changes"
    write(tmp_path / "Commits", [{"id": f"q{u}", "input": ask, "profile": diffs, "user_id": f"u{u}"} for u in range(2)])
    experiment = example("commits")
    run = ran(experiment)
    assert set(run.read("metrics")["metric"]) == {"first_word", "rougeL"}
    assert set(run.read("predictions")["score"]) <= {0.0, 1.0}


def test_population(example, ran):
    experiment = example("diaries")
    assert len(open_population(experiment, 1).user(0).history) == 5
    assert set(ran(experiment).read("predictions")["user_id"]) == {"writer-1-0", "writer-1-1"}


def test_generator(example, ran):
    samples = ran(example("shouting")).read("samples")
    assert len(samples) and samples["input"].str.endswith("!!").all()


def test_strategy(example):
    """Two devices, one with three times the data of the other: both count alike."""
    strategy = open_strategy(example("uniform", arms="frozen,federated"))
    init = {"layer": (np.ones((8, 2)), np.zeros((3, 8)))}
    shared = {f"all/{name}": array for name, array in strategy.begin(init).items()}
    replies = []
    for device, (examples, value) in enumerate(((3, 1.0), (1, 5.0))):
        site = Site(device, 0, 8, examples, init, lambda: init)
        up = strategy.upload({}, {"lora": {"layer": (np.full((8, 2), value), np.full((3, 8), value))}}, site)
        replies.append(Reply(arrays={f"all/{name}": array for name, array in up.items()}))
    after = strategy.aggregate(1, 0, shared, replies)
    assert np.allclose(after["all/lora/A/layer"], 3.0) and np.allclose(after["all/lora/B/layer"], 3.0)


def test_analysis(tmp_path):
    code, toml = examples()["answers"]
    (tmp_path / "answers.py").write_text(code)
    (tmp_path / "steps.toml").write_text(toml)
    study = Study.read(str(tmp_path / "steps.toml"), {"population.users": "2"})

    def run_cells(runs):
        for number, run in enumerate(runs):
            rows = {"seed": 1, "round": 0, "arm": "local", "task": "LaMP_2", "user_id": "u", "score": [0.0, number]}
            pd.DataFrame(rows).to_parquet(run.path / "predictions.parquet")
            run.write_json("summary.json", {"rows": [], "facts": {}})

    run_study(study, tmp_path / "out", run_cells)
    assert pd.read_csv(tmp_path / "out" / "table.csv")["score"].tolist() == [0.0, 0.5]


def test_tracker(example, ran):
    experiment = example("csv_lines", arms="local")
    run = ran(experiment)
    with tracked(run, Silent()) as watching:
        watching.begin(1, 0)
        watching.end()
    lines = [line.split(",") for line in (run.path / "figures.csv").read_text().splitlines()]
    mean = run.read("metrics").query("metric == 'rouge1'")["value"].mean()
    assert ["0", "LaMP_4/rouge1/local", str(round(mean, 3))] in lines


def test_device_and_model(example):
    virtual = Timeline(example("lab"), 1, device_id)
    phone = virtual.profile(0)
    assert phone.title == "The phone in our lab" and phone.sources["compute_gflops"] == "measured"
    assert virtual.model.layers == 20 and np.isfinite(virtual.cost(0, "local").training_s(100))


# --- mistakes ------------------------------------------------------------------------------------------------------

GOOD = """
from untether.plugins import Section, register
class Mine(Section):
    low: float = 0.5
register("policy", "mine", lambda case, settings: True, settings=Mine)
"""


HAVE = "from untether.plugins import register\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "no such file"),
        ("x = 1", "registers nothing"),
        ("x = 1\nx / 0", r"cannot be imported: ZeroDivisionError: .* \(line 2\)"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'.*Install it"),
        ("def", "SyntaxError"),
        (HAVE + "register('policy', 'never', len)", "policy `never` is registered already"),
        (HAVE + "register('polcy', 'x', len)", "Did you mean `policy`"),
        (HAVE + "register('policy', 'x', len, watch=1)", "Did you mean `watches`"),
        (HAVE + "register('policy', 'x', len, settings=dict)", "plugins.Section"),
    ],
)  # fmt: skip
def test_a_plug_in_that_is_wrong_is_told_readably(tmp_path, code, said):
    path = tmp_path / "mine.py"
    if code is not None:
        path.write_text(code)
    (tmp_path / "e.toml").write_text('plugins = ["mine.py"]')
    with pytest.raises(UserError, match=rf"plugins: `{re.escape(str(path))}`.*{said}"):
        Experiment.read(tmp_path / "e.toml")
    path.write_text(GOOD)  # nothing of the first try is left
    assert Experiment.read(tmp_path / "e.toml", {"drift.policy": "mine"}).settings == {"mine": {"low": 0.5}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"settings.mine.lw": "1"}, "settings.mine.lw: unknown key `lw`. Did you mean `low`"),
        ({"settings.mine.low": "much"}, r"settings.mine.low: .*valid number.*'much'"),
        ({"settings.mien.low": "1"}, "unknown settings `mien`. Did you mean `mine`"),
        ({"drift.policy": "mien"}, "drift.policy: unknown policy `mien`. Did you mean `mine`.*never"),
    ],
)
def test_settings_are_checked_as_they_are_read(tmp_path, settings, said):
    (tmp_path / "mine.py").write_text(GOOD)
    with pytest.raises(UserError, match=said):
        Experiment.read(None, {"plugins": str(tmp_path / "mine.py"), **settings})


def test_the_command_ends_with_exit_code_2(tmp_path):
    done = untether_here("run", "--set", "plugins=nowhere.py", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "plugins: `nowhere.py`: no such file" in done.stderr and "Traceback" not in done.stderr


def test_modules_and_files_are_imported_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_of_mine.py").write_text(GOOD)
    (tmp_path / "mine.py").write_text(GOOD.replace("mine", "its"))
    names = ["module_of_mine", str(tmp_path / "mine.py")]
    assert load_plugins(names) == load_plugins([*names, *names])[:2] == tuple(names)
    assert set(fingerprints(names)) == set(names)
    with pytest.raises(UserError, match="`no.such.module`: no such module"):
        load_plugins(["no.such.module"])


def test_a_run_goes_on_with_the_plug_ins_that_it_began_with(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    fields = {"plugins": str(tmp_path / "mine.py"), "drift.policy": "mine"}
    run = prepare(Experiment.read(None, SMALL | {"population.tasks": "LaMP_2"} | fields), tmp_path / "run")
    reopen(run.path)
    (tmp_path / "mine.py").write_text(GOOD + "\n")
    with pytest.raises(UserError, match="mine.py: not what the run began with"):
        reopen(run.path)


def test_names_of_settings_are_shared_by_all_kinds():
    class Mine(Section):
        low: float = 0.5

    register("policy", "mine", lambda case, settings: True, settings=Mine)
    with pytest.raises(ValueError, match="something else with settings"):
        register("filter", "mine", lambda settings: None, settings=Mine)
