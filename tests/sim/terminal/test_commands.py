"""What a person types beside `run`: fields shown and explained, runs compared, a machine looked at, words completed."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest
from finished_run import synthetic_run
from typer.testing import CliRunner

from tests.clients.scripted_cloud import Cloud, good
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment, guide
from untether.sim.report.compare import Comparison
from untether.sim.run.directory import RunDirectory
from untether.sim.terminal.cli import app
from untether.sim.terminal.completion import complete_field, complete_section, complete_setting, complete_study
from untether.sim.terminal.examining import examine


def said(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result.output


def test_the_version_is_the_packages():
    assert re.fullmatch(r"untether \d+\.\d+\.\d+\n", said("--version"))


def test_help_of_run_is_short_and_leads_to_the_fields():
    text = said("run", "--help")
    assert len(text.splitlines()) < 40
    for word in ("experiment show", "experiment explain", "experiment check", "--quiet", "--json"):
        assert word in text


def test_a_sections_fields_stand_in_aligned_columns():
    lines = said("experiment", "show", "lora").splitlines()
    rows = [line for line in lines if line.startswith("lora.")]
    assert len(rows) == 5
    column = lines[0].index("default")
    assert all(row[column - 1] == " " and row[column] != " " for row in rows)


def test_without_a_section_the_whole_experiment_is_printed_as_one_that_reads(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(said("experiment", "show", "--set", "lora.rank=4"))
    assert Experiment.read(path).lora.rank == 4
    assert "rank = 4" in said("experiment", "show", str(path))


def test_a_field_is_explained():
    text = said("experiment", "explain", "lora.rank")
    for words in ("whole number, at least 1 and at most 1024", "the adapter's size", "sim/time/cost.py"):
        assert words in text


@pytest.mark.parametrize("name", guide.names())
def test_every_field_can_be_explained(name):
    found = guide.explain(name, places=False)
    assert found.meaning and found.values and found.changes


def test_modules_that_are_said_to_read_a_section_are_there():
    assert set(guide.READ_WHOLE) >= {"", *guide.sections()}
    for modules in guide.READ_WHOLE.values():
        assert all(Path(module).is_file() for module in modules)


@pytest.mark.parametrize(
    ("call", "name", "near"), [(guide.explain, "lora.rnk", "lora.rank"), (guide.in_section, "filtres", "filters")]
)
def test_an_unknown_name_gets_the_nearest_one(call, name, near):
    with pytest.raises(UserError, match=f"Did you mean `{near}`"):
        call(name)


def test_words_are_completed():
    assert complete_setting("lora.r") == ["lora.rank="]
    assert complete_setting("drift.policy=when") == ["drift.policy=when_online"]
    assert complete_setting("arms=local,plac") == ["arms=local,placebo"]
    assert complete_setting("nonsense=") == []
    assert complete_field("lora.a") == ["lora.alpha"]
    assert "cloud.capacity" in complete_section("cloud")
    assert "connectivity" in complete_study("con")


def test_quiet_and_json_exclude_each_other():
    result = CliRunner().invoke(app, ["run", "--quiet", "--json"])
    assert isinstance(result.exception, UserError)


# --- compare ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return [
        synthetic_run(folder / "one", users=8),
        synthetic_run(folder / "two", users=12, lora={"rank": 4}, arms=["frozen", "local", "collaborative", "cloud"]),
    ]


def test_a_comparison_pairs_the_users_that_both_have(two):
    comparison = Comparison(two)
    assert dict(comparison.fields())["lora.rank"] == ["8", "4"]
    found = comparison.differences()
    assert {one.arm for one in found} == {"frozen", "local", "collaborative", "cloud"}
    assert {one.n_users for one in found} == {8}
    assert all(one.diff == 0 and one.verdict() == "no difference shown" for one in found), "their scores are the same"


def test_a_difference_is_the_paired_one_and_its_p_the_sign_flips(two, tmp_path):
    shutil.copytree(two[0].path, tmp_path / "better")
    better = RunDirectory.open(tmp_path / "better")
    frame = better.read("metrics")
    frame.loc[frame["arm"] == "local", "value"] += 0.25
    frame.to_parquet(better.path / "metrics.parquet")
    found = {(one.task, one.arm): one for one in Comparison([two[0], better]).differences()}
    own = found["LaMP_2", "local"]
    assert (own.diff, own.low, own.high) == pytest.approx((0.25, 0.25, 0.25))
    assert own.p == pytest.approx(2 / 2**8), "of all signs of eight users, two are as extreme"
    assert own.verdict() == "better" and found["LaMP_3", "local"].verdict() == "worse"
    assert found["LaMP_2", "placebo"].diff == 0


def test_the_command_writes_a_page_and_a_table(two, tmp_path):
    text = said("compare", str(two[0].path), str(two[1].path), "--out", str(tmp_path / "out"))
    assert "lora.rank" in text and "no difference shown" in text
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "<svg" in page and "Over 8 common users" in page
    rows = list(csv.DictReader((tmp_path / "out" / "differences.csv").open(encoding="utf-8")))
    assert len(rows) == 16 and {row["verdict"] for row in rows} == {"no difference shown"}


@pytest.mark.parametrize("places", [(0,), (0, 0)])
def test_what_cannot_be_compared_is_said(two, places):
    with pytest.raises(UserError, match="compare: "):
        Comparison([two[place] for place in places])


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_an_endpoint_gets_one_real_request():
    cloud = Cloud()
    cloud.script = [good]
    try:
        experiment = Experiment.build(
            {"cloud": {"provider": "openai", "base_url": cloud.base_url, "model": "m",
                       "capacity": {"price_in": 1.0, "price_out": 2.0}}}, None, "the test",
        )  # fmt: skip
        found = {finding.name: finding for finding in examine(experiment)}
    finally:
        cloud.close()
    assert found["endpoint"].fine and "ok in" in found["endpoint"].text and "price 0.00" in found["endpoint"].text
    assert found["base model"].fine and found["encoder"].fine and found["installation"].fine


def test_what_is_wrong_comes_with_how_to_mend_it(monkeypatch):
    experiment = Experiment.build(
        {"cloud": {"provider": "openai", "base_url": "https://nowhere.example/v1", "model": "m"},
         "model": {"base": "./no/such/folder"}}, None, "the test",
    )  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = {finding.name: finding for finding in examine(experiment)}
    assert not found["endpoint"].fine and "OPENAI_API_KEY" in found["endpoint"].text
    assert not found["base model"].fine and found["base model"].mend
