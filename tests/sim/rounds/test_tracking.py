"""What trackers are told is what the tables say, and whatever becomes of a tracker, the run goes on."""

import sys
import threading

import pytest
from fleet import NOWHERE, Silent, make_worker, run_in_process, tiny

from untether.clients.hosting.executors import InProcess
from untether.clients.hosting.in_process import InProcessBackend
from untether.sim.core.kinds import TRACKERS
from untether.sim.core.registry import Entry
from untether.sim.rounds import tracking
from untether.sim.rounds.loop import run_rounds
from untether.sim.run.directory import RunDirectory
from untether.strategies import open_strategy

SMALL = {"arms": "frozen,local", "population__users": 2, "training__steps": 1, "rounds": 2}


class Watching(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def run_tracked(path, **changes):
    """The run, merged, and what was noted."""
    experiment, watching = tiny(**SMALL, **changes), Watching()
    run = RunDirectory.create(path, experiment)
    worker = make_worker(run, NOWHERE)
    with tracking.tracked(run, watching) as progress:
        run_rounds(run, InProcessBackend(run, InProcess(lambda: worker)), open_strategy(experiment), progress)
    run.merge(experiment)
    return run, watching.notes


def expected(run, round):
    frame = run.read("metrics").query(f"round == {round}")
    means = frame.groupby(["task", "metric", "arm"])["value"].mean()
    return {f"{task}/{metric}/{arm}": value for (task, metric, arm), value in means.items()}


def registered(monkeypatch, name, made):
    monkeypatch.setitem(TRACKERS._added, name, Entry(made))  # as `register` does, taken back afterwards


def test_tensorboard_holds_what_the_tables_say(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, notes = run_tracked(tmp_path / "run", engine__track="tensorboard")
    assert notes == []
    told = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name, mean in expected(run, 0).items():
        first, second = told.Scalars(name)
        assert (first.step, second.step) == (0, 1)
        assert (first.value, second.value) == pytest.approx((mean, expected(run, 1)[name]))
    assert told.Scalars("work/trained_tokens")[0].value > 0


def test_mlflow_holds_what_the_tables_say(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, notes = run_tracked(tmp_path / "run", engine__track="mlflow")
    assert notes == []
    client = mlflow.tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    [kept] = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert kept.data.params["lora.rank"] == str(run.experiment.lora.rank) and kept.info.status == "FINISHED"
    for name, mean in expected(run, 1).items():
        assert [(one.step) for one in client.get_metric_history(kept.info.run_id, name)] == [0, 1]
        assert kept.data.metrics[name] == pytest.approx(mean)


def test_wandb_without_a_key_stays_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run, notes = run_tracked(tmp_path / "run", engine__track="wandb")
    assert notes == [] and list((run.path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracker_that_fails_hangs_or_is_missing_costs_a_note(tmp_path, monkeypatch):
    class Fails:
        def __init__(self, run):
            self.told = []

        def log(self, values, step):
            raise ConnectionError("no route to the server\nat all")

        def close(self):
            raise AssertionError("it has ended")

    let_go = threading.Event()

    def hangs(run):
        let_go.wait(60)

    registered(monkeypatch, "fails", Fails)
    registered(monkeypatch, "hangs", hangs)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.5)
    run, notes = run_tracked(tmp_path / "run", engine__track="fails,hangs,tensorboard")
    assert len(run.read("predictions")) == 2 * 2 * 2 * 2 * 2
    assert len(notes) == 3 and "nothing more is sent to fails: ConnectionError: no route to the server" in notes
    assert any("hangs does not answer" in note for note in notes)
    assert any("pip install 'untether[tensorboard]'" in note for note in notes)
    let_go.set()


def test_nothing_is_tracked_unless_asked(tmp_path):
    experiment = tiny(**SMALL)
    watching = Watching()
    with tracking.tracked(RunDirectory.create(tmp_path / "run", experiment), watching) as progress:
        assert progress is watching


def test_seeds_are_told_apart(tmp_path):
    run = run_in_process(tmp_path / "run", tiny(**{**SMALL, "rounds": 1}, seeds="1,2"), NOWHERE)
    told = tracking.round_values(run, 2, 0)
    assert told and all(name.startswith("seed-2/") for name in told)
