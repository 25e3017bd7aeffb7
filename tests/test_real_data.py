"""Real histories in LaMP's format, through the whole main job. Needs the folder in UNTETHER_REAL_DATA."""

import os
from pathlib import Path

import pytest

from tests.conftest import settings, untether
from tests.test_main_job import check_order
from untether.sim.run.directory import RunDirectory

DATA = os.environ.get("UNTETHER_REAL_DATA", "")
pytestmark = pytest.mark.skipif(not DATA, reason="UNTETHER_REAL_DATA does not name a folder of real data")


@pytest.mark.parametrize("task", ["LaMP_2N", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"])
def test_every_stage_runs_on_real_histories(tmp_path, task):
    values = {
        "population.source": "lamp", "population.path": str(Path(DATA) / "lamp" / task), "population.users": "20",
        "population.queries": "2", "population.max_history": "8", "cloud.samples": "8", "training.epochs": "1",
        "population.shared_users": "3",
        "arms": "frozen,majority,shared,rag,local,local_matched,placebo,collaborative,cloud",
    }  # fmt: skip
    done = untether("run", "--out", str(tmp_path / "run"), *settings(values), timeout_s=280)
    assert done.returncode == 0, done.stderr
    run = RunDirectory.open(tmp_path / "run")
    predictions, samples = run.read("predictions"), run.read("samples")
    assert predictions["user_id"].nunique() == 20
    assert (predictions["outcome"] == "ok").all()
    assert len(samples) > 100 and (samples["verdict"] == "accepted").any()
    if task in ("LaMP_2N", "LaMP_4"):
        check_order(run)
    facts = run.read_json("summary.json")["facts"]
    assert facts["order"] == ("time" if task in ("LaMP_2N", "LaMP_4") else "unknown")
    assert facts["cloud"]["wrote_by_language_model"] is False
    report = (run.path / "report.html").read_text()
    assert "No language model wrote the synthetic samples" in report
