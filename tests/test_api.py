"""Runs from Python: what a script and a notebook get, and that a stop leaves both of them, and the run, whole."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fleet import answers, losses, metrics, run_in_process, tiny
from pandas.testing import assert_frame_equal
from peft import PeftConfig

import untether
from untether.clients.device.worker import Endpoint
from untether.server.background import start_background
from untether.sim.run.directory import RunDirectory


class Watcher:
    """Writes down what it is told; fails on the round that it is asked to fail on."""

    def __init__(self, fails_with: BaseException | None = None):
        self.fails_with, self.told = fails_with, []

    def on_start(self, run):
        self.told.append(("start", run.finished))

    def on_round(self, seed, round, facts):
        self.told.append((seed, round, facts["totals"] != {}))
        if self.fails_with is not None:
            raise self.fails_with

    def on_end(self, run):
        self.told.append(("end", run.finished))


class Interrupter(Watcher):
    """Ctrl-C, once devices of a new run have been asked for something; `sent` says that it was, and who heard it."""

    sent = ""

    def on_start(self, run):
        super().on_start(run)
        threading.Thread(target=self.interrupt, args=[run.path / "state" / "progress"], daemon=True).start()

    def interrupt(self, folder: Path) -> None:
        while not list(folder.glob("*.done")):
            time.sleep(0.1)
        self.sent = f"to {signal.getsignal(signal.SIGINT)} after {self.told}"
        os.kill(os.getpid(), signal.SIGINT)


def in_a_notebook(call):
    """What `call` returns in a thread that is not the main one, with an event loop running."""
    found = []

    async def cell():
        found.append(call())

    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: what a shell starts in the background ignores it, these tests among it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(1200)
def test_a_stopped_run_ends_with_the_numbers_of_one_that_was_not(tmp_path, capfd, interruptible):
    experiment, out = tiny(rounds=2, engine__workers=1, population__users=2), tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    first = Interrupter()
    with pytest.raises(KeyboardInterrupt, match="untether.run"):
        untether.run(experiment, out, [first], progress=False)
        pytest.fail(f"nobody heard the interrupt: {first.sent or 'it was never sent'}")
    assert first.told == [("start", False)] and "default_int_handler" in first.sent, first.sent
    with pytest.raises(untether.UserError, match="not finished"):
        untether.open(out).metrics  # noqa: B018

    second = Watcher()
    run = in_a_notebook(lambda: untether.run(out=out, callbacks=[second]))
    assert second.told == [("start", False), (1, 0, True), (1, 1, True), ("end", True)]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    print("still heard")
    assert "still heard" in capfd.readouterr().out

    with start_background("world", {}) as gateway:
        endpoint = Endpoint(gateway.base_url, gateway.model, gateway.fingerprint)
        undisturbed = run_in_process(tmp_path / "undisturbed", experiment, endpoint)
    directory = RunDirectory.open(out)
    for table in (answers, metrics, losses):
        assert_frame_equal(table(directory), table(undisturbed), rtol=1e-3)

    assert len(run.metrics) and set(run.predictions["arm"]) == set(experiment.arms) and run.experiment == experiment
    assert all(len(frame) for frame in (run.samples, run.events, run.ledger, run.training))
    assert set(run.summary.columns) >= {"task", "arm", "metric", "reference", "mean"} and run.report.is_file()
    html = run._repr_html_()
    assert "collaborative" in html and "report.html" in html and len(html) < 5000
    assert PeftConfig.from_pretrained(str(run.adapter("d00001", "local"))).r == experiment.lora.rank

    again = untether.run(experiment, out)  # nothing is left to do
    assert_frame_equal(again.metrics, run.metrics)
    with pytest.raises(untether.UserError, match="lora.rank"):
        untether.run(experiment, out, **{"lora.rank": 2})


def stands_in(monkeypatch, rounds=1, error=None):
    """In place of Flower and Ray: rounds that are committed, and an end."""

    def carry_out(runs, progress, stop):
        (run,) = runs
        progress.start(run.experiment.seeds, rounds, 0)
        for round in range(rounds):
            progress.begin(1, round)
            run.commit(1, round, {}, {"totals": {"devices": 1}})
            progress.end()
        if error is not None:
            raise error
        run.drop_parts()

    monkeypatch.setattr("untether.api.carry_out", carry_out)


@pytest.mark.parametrize("given, settings", [
    ({"lora.rank": 4, "population.users": 3}, {}), ({"lora": {"rank": 4}}, {"population": {"users": "3"}}),
    (None, {"lora.rank": "4", "population.users": 3}),
    (untether.Experiment(lora={"rank": 4}, population={"users": 5}), {"population.users": 3}),
])  # fmt: skip
def test_fields_are_given_as_one_likes(tmp_path, monkeypatch, given, settings):
    stands_in(monkeypatch)
    run = untether.run(given, tmp_path / "run", progress=False, seeds=[1, 2], **settings)
    assert run.finished and run.experiment == untether.Experiment(
        seeds=(1, 2), lora={"rank": 4}, population={"users": 3}
    )


def test_a_callback_may_stop_a_run_after_a_round(tmp_path, monkeypatch):
    stands_in(monkeypatch, rounds=2)
    stops = Watcher(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="untether.run"):
        untether.run(tiny(rounds=2), tmp_path / "run", [stops])
    assert stops.told == [("start", False), (1, 0, True)]


def test_mistakes_are_the_users(tmp_path):
    with pytest.raises(untether.UserError, match="lora.rang"):
        untether.run({"lora.rang": 4}, tmp_path / "run")
    with pytest.raises(untether.UserError, match="no such experiment file"):
        untether.run(tmp_path / "none.toml", tmp_path / "run")
    with pytest.raises(untether.UserError, match="not a run directory"):
        untether.open(tmp_path)


def test_an_error_in_a_callback_says_whose_it_was_and_how_to_go_on(tmp_path, monkeypatch):
    stands_in(monkeypatch, rounds=2)
    watcher = Watcher(ValueError("no good"))
    with pytest.raises(untether.ResumableStop) as stop:
        untether.run(None, tmp_path / "run", [watcher], progress=False)
    assert "Watcher.on_round (seed 1, round 0) failed: ValueError: no good" in str(stop.value)
    assert f"untether.run(out='{tmp_path / 'run'}')" in str(stop.value) and watcher.told[-1][:2] == (1, 0)
    assert isinstance(stop.value.__cause__, ValueError)


def test_a_defect_reaches_the_caller_even_while_another_error_is_looked_after(tmp_path, monkeypatch):
    stands_in(monkeypatch, error=untether.Failure("a defect"))
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(untether.Failure, match="a defect"):
            untether.run(None, tmp_path / "run", progress=False)


def test_nothing_heavy_is_loaded_before_it_is_asked_for():
    heavy = "{'pandas', 'torch', 'ray', 'pydantic'}"
    code = f"import sys, untether; print({heavy} & set(sys.modules), untether.run.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "run"]
    assert not hasattr(untether, "nothing")
