"""One record an arm: the table agrees with itself, and nobody else knows the arms by name."""

import ast
from pathlib import Path

import pytest

from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ALONE, ARMS, CLOUD, FLOOR, METHOD, PRIMARY, SHARED, ordered, trained
from untether.sim.population.tasks import get_task

HOME = Path("sim/experiment/arms.py")
OTHER_MEANINGS = {
    ("cloud", "sim/terminal/cli.py"): "the command `untether cloud`",
    ("cloud", "sim/studies/runner.py"): "the section [cloud] of an experiment",
    ("cloud", "clients/hosting/node.py"): "the section [cloud] of an experiment",
    ("cloud", "sim/studies/scale/figures.py"): "the axis of the study: which cloud",
    ("cloud", "sim/studies/scale/prose.py"): "the axis of the study: which cloud",
    ("cloud", "sim/run/environment.py"): "the cloud's model, among the models",
    ("cloud", "sim/report/finish.py"): "what is known of the endpoint, in the summary's facts",
    ("cloud", "sim/report/prose.py"): "what is known of the endpoint, in the summary's facts",
    ("cloud", "sim/experiment/guide.py"): "the section [cloud] of an experiment",
    ("cloud", "sim/launch/progress.py"): "the cloud's health, among the facts of progress",
    ("cloud", "sim/launch/estimate.py"): "the cloud's part of what a run takes",
    ("majority", "sim/launch/estimate.py"): "who answers, a word of the record",
    ("local", "sim/launch/cluster.py"): "Ray's own word for a cluster of its own",
    ("majority", "clients/device/answering.py"): "who answers, a word of the record",
    ("shared", "clients/device/answering.py"): "who answers, a word of the record",
    ("shared", "sim/experiment/sections.py"): "where training begins",
    ("cloud", "clients/device/answering.py"): "who answers, a word of the record",
}
"""Where a word that is also an arm's name means something else."""


def test_names_and_roles():
    assert [name for name, arm in ARMS.items() if arm.name != name] == []
    assert {FLOOR, SHARED, ALONE, METHOD, CLOUD} <= set(ARMS)
    assert not ARMS[ALONE].needs_samples and ARMS[METHOD].needs_samples
    assert ARMS[CLOUD].answers == "cloud" and ARMS[SHARED].answers == "shared" and ARMS[FLOOR].answers == "base"


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_a_record_agrees_with_itself_and_the_others(arm):
    assert arm.meaning
    assert {arm.steps_of, arm.adapter_of, *(reference.arm for reference in arm.references)} <= {*ARMS, ""}
    assert arm.name not in (arm.steps_of, arm.adapter_of, *(reference.arm for reference in arm.references))
    assert arm.trains == (bool(arm.learns) and arm.answers == "adapter"), "an adapter comes of something"
    assert not (arm.trains and arm.adapter_of), "its own adapter, or another's"
    assert not arm.adapter_of or ARMS[arm.adapter_of].trains
    assert not arm.steps_of or (arm.trains and not ARMS[arm.steps_of].steps_of)
    assert not arm.draws or "accepted" in arm.learns, "drawn are as many as were accepted"
    assert set(arm.kinds) <= {"classification", "rating", "generation"}


def test_the_arms_that_need_samples():
    needing = {name for name, arm in ARMS.items() if arm.needs_samples}
    assert needing == {
        "rag_adapter", "local_matched", "synthetic_only", "unfiltered", "unfiltered_matched", "placebo",
        "collaborative", "oracle",
    }  # fmt: skip


def test_the_primary_contrasts_are_those_of_the_design():
    assert PRIMARY == (("collaborative", "local_matched"), ("collaborative", "placebo"))


def test_the_majority_has_no_label_where_there_are_none():
    assert ARMS["majority"].answers_kind(get_task("LaMP_2").kind)
    assert not ARMS["majority"].answers_kind(get_task("LaMP_4").kind)


def test_an_arm_that_wears_another_adapter_brings_it():
    assert trained(("rag_adapter",)) == ["collaborative"]
    assert trained(("frozen", "shared", "cloud", "local")) == ["local"]


def test_reports_show_known_arms_in_order_and_unknown_ones_last():
    assert ordered(["zeta", "cloud", "frozen", "alpha", "cloud"]) == ["frozen", "cloud", "alpha", "zeta"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="collaborativ.*collaborative"):
        Experiment(arms=("collaborativ",))
    with pytest.raises(ValueError, match="frost"):
        Experiment.model_validate({"by_arm": {"frost": {}}})


def test_nobody_else_names_an_arm():
    named = {
        (node.value, str(path))
        for package in ("sim", "clients", "server", "strategies")
        for path in Path(package).rglob("*.py") if path != HOME
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ARMS
    }  # fmt: skip
    assert named == set(OTHER_MEANINGS), "say `arms.METHOD`, or ask the record"
