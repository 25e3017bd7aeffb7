"""The experiment: what it refuses, how it says so, and that it survives its own TOML."""

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import fuse_dicts
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment, fields
from untether.sim.experiment.arms import ARMS, FEDERATED
from untether.sim.launch.app_config import AppConfig, from_run_config


def test_default_experiment_round_trips_through_toml():
    experiment = Experiment()
    assert Experiment.model_validate(tomllib.loads(experiment.to_toml())) == experiment
    assert Experiment.model_validate(tomllib.loads(experiment.to_toml(comments=True))) == experiment


@given(
    rank=st.integers(1, 64), rate=st.floats(1e-6, 1.0), seeds=st.lists(st.integers(0, 99), min_size=1, unique=True),
    arms=st.lists(st.sampled_from([arm for arm in ARMS if arm != FEDERATED]), min_size=1, unique=True),
)  # fmt: skip
def test_any_valid_experiment_round_trips(tmp_path_factory, rank, rate, seeds, arms):
    experiment = Experiment(
        seeds=tuple(seeds), arms=tuple(arms), lora={"rank": rank}, population={"max_history": 8},
        by_arm={"local": {"training": {"learning_rate": rate}}},
    )
    path = tmp_path_factory.mktemp("toml") / "experiment.toml"
    path.write_text(experiment.to_toml())
    assert Experiment.read(path) == experiment


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora.rnak", "4", ("lora.rnak", "Did you mean `rank`")),
        ("populaton.users", "4", ("populaton", "Did you mean `population`")),
        ("lora.rank", "three", ("lora.rank", "valid integer", "'three'")),
        ("lora.rank", "0", ("lora.rank", "greater than or equal to 1", "0")),
        ("arms", "locall", ("arms", "`locall`", "Did you mean `local`")),
        ("arms", "oracle", ("oracle", "population.max_history = 0", "such as 8")),
        ("seeds", "1,1", ("seeds", "distinct")),
        ("cloud.provider", "openai", ("cloud.base_url and cloud.model",)),
        ("cloud.base_url", "http://127.0.0.1:1/v1", ('Set cloud.provider = "openai"',)),
        ("population.source", "lamp", ("population.path",)),
        ("population.history", "[5, 2]", ("least", "most")),
        ("by_arm.local.training.lr", "1", ("by_arm.local.training.lr", "Known: learning_rate")),
        ("by_arm.locall.training.steps", "1", ("locall", "Did you mean `local`")),
    ],
)
def test_mistakes_are_named_with_field_value_rule_and_fix(key, value, said):
    with pytest.raises(UserError) as error:
        Experiment.read(None, {key: value})
    for words in said:
        assert words in str(error.value)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match="no such experiment file"):
        Experiment.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 2\n")
    with pytest.raises(UserError, match=r"bad\.toml: not a TOML file.*line 1"):
        Experiment.read(tmp_path / "bad.toml")


def test_overrides_take_lists_strings_and_numbers():
    experiment = Experiment.read(
        None,
        {"seeds": "1,2", "arms": '["local", "frozen"]', "population.tasks": "LaMP_4", "name": "1e3", "lora.rank": "4"},
    )
    assert experiment.seeds == (1, 2)
    assert experiment.arms == ("frozen", "local"), "arms stand in the order of the design"
    assert experiment.population.tasks == ("LaMP_4",)
    assert experiment.name == "1e3"
    assert experiment.lora.rank == 4


def test_hyper_parameters_by_arm():
    experiment = Experiment(by_arm={"local": {"training": {"learning_rate": 0.5}, "lora": {"rank": 2}}})
    lora, training = experiment.for_arm("local")
    assert (lora.rank, training.learning_rate) == (2, 0.5)
    lora, training = experiment.for_arm("collaborative")
    assert (lora.rank, training.learning_rate) == (experiment.lora.rank, experiment.training.learning_rate)


def test_every_field_has_a_meaning():
    listed = list(fields())
    assert len(listed) > 60
    assert [key for key, _, meaning in listed if not meaning] == []


def test_flowers_run_config_says_what_the_command_is_told(tmp_path, monkeypatch):
    """Flower refuses keys that pyproject.toml does not name, so those that are read stand there, empty."""
    declared = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.toml").write_text("[lora]\nrank = 2\n")
    words = "population.users=3 'name=a b' model.template_args.date_string='\"26 Jul\"' arms=local,collaborative"
    assert set(declared.values()) == {"", 0}
    told = {"experiment": str(tmp_path / "e.toml"), "set": words, "out": str(tmp_path / "run")}
    run, _, _ = from_run_config(AppConfig.read(fuse_dicts(declared, told)))
    said = run.experiment
    assert (said.lora.rank, said.population.users, said.name) == (2, 3, "a b")
    assert said.arms == ("local", "collaborative") and said.model.template_args == {"date_string": "26 Jul"}
    assert AppConfig.read(declared).experiment == Experiment()
    with pytest.raises(UserError, match="--run-config set users: give KEY=VALUE"):
        AppConfig.read({"set": "users"})


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", ".hidden", "a/b", "x\x1b[2J", "", "x" * 101])
def test_a_name_is_one_and_no_path(name):
    """A run's directory bears it, and an experiment's file may be a stranger's."""
    with pytest.raises(UserError, match="name"):
        Experiment.read(None, {"name": name})


def test_more_rounds_than_anybody_can_run_are_refused():
    with pytest.raises(UserError, match="rounds.*100000"):
        Experiment.read(None, {"rounds": "999999999999"})
